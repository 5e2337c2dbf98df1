"""Every configuration under examples/ is valid, fits its model, and has a working command."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.cli.main import build_parser
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.plan.devices import DEVICES
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PATHS = sorted(EXAMPLES.rglob("*.y*ml"))

GPUS_PER_NODE = 8  # launch/slurm.sh's default
COMMAND = re.compile(r"^#  +((?:torchrun|sbatch|megatron-idpo|python) .*)$", re.M)
WORLD = re.compile(r"^# (\d+) processes: TP (\d+) × PP (\d+) (?:× CP (\d+) )?× DP (\d+)\.", re.M)
NOT_RUN = "Not run (no GPU available); sizes are calculated"

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
"""Fields of its config.json that differ from the 8B model's."""

HF_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("smollm2-135m", {}),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2.5-7b", {}),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b", {}),
    "meta-llama/Llama-3.1-70B-Instruct": ("llama-3.1-8b", LLAMA_70B),
    "mistralai/Mistral-7B-Instruct-v0.1": ("mistral-7b-instruct-v0.1", {}),
    "runs/smollm2": ("smollm2-135m", {}),
    "upstage/SOLAR-10.7B-Instruct-v1.0": ("solar-10.7b", {}),
}
"""Model of an example -> the file in tests/mcore/hf_configs, and fields that differ."""

each_example = pytest.mark.parametrize(
    "path", PATHS, ids=lambda path: str(path.relative_to(EXAMPLES))
)


def read(path: Path) -> RunConfig:
    return load_config(path, optional=SECTIONS)


def architecture(model: str) -> Architecture:
    name, differences = HF_CONFIGS[model]
    config = json.loads((ROOT / "tests/mcore/hf_configs" / f"{name}.json").read_text())
    return Architecture.from_hf(config | differences)


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(line) for line in COMMAND.findall(path.read_text())]


def world_size(words: list[str]) -> int:
    """Processes that a command starts."""

    def option(name: str, default: int) -> int:
        return int(words[words.index(name) + 1]) if name in words else default

    if "--processes" in words:
        return option("--processes", 1)
    nodes = option("--nodes" if words[0] == "sbatch" else "--nnodes", 1)
    per_node = GPUS_PER_NODE if words[0] == "sbatch" else option("--nproc-per-node", 1)
    return nodes * per_node


def test_the_examples_of_readme_and_launchers_exist() -> None:
    names = {"idpo_mistral_7b", "solar_10_7b", "llama3_8b", "llama3_70b", "qwen2_5_7b"}
    assert names | {"sdpo_solar_10b"} <= {path.stem for path in PATHS}


@each_example
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    read(path)


@each_example
def test_an_example_fits_its_model(path: Path) -> None:
    """With the number of processes of each of its commands."""
    config = read(path)
    model = architecture(config.model.path)
    resolve_layers(config.objective.layers, model.num_layers)
    for words in commands(path):
        problems = config.layout.problems_for(model, world_size(words))
        assert not problems, "\n".join(map(str, problems))
    assert config.data.max_length and config.data.max_length <= model.max_positions


@each_example
def test_the_header_of_an_example_has_a_valid_command(path: Path) -> None:
    assert commands(path), "its header has no command"
    for words in commands(path):
        assert str(path.relative_to(ROOT)) in words
        if words[0] == "sbatch":
            (script,) = (word for word in words if word.endswith(".sh"))
            assert (ROOT / script).is_file()
        else:
            begin = words.index("megatron_idpo") if "megatron_idpo" in words else 0
            build_parser().parse_args(words[begin + 1 :])


@each_example
def test_process_counts_of_the_header_are_correct(path: Path) -> None:
    layout = read(path).layout
    for counts in WORLD.findall(path.read_text()):
        world, tensor, pipeline, context, data = (int(count or 1) for count in counts)
        assert (tensor, pipeline, context) == (layout.tensor, layout.pipeline, layout.context)
        assert world == tensor * pipeline * context * data
        assert {world_size(words) for words in commands(path)} == {world}


@each_example
def test_examples_for_gpus_are_marked_as_not_run(path: Path) -> None:
    """They also state their number of processes, and have their own directory under runs/."""
    config, text = read(path), path.read_text()
    if config.layout.model_ranks == 1 or path.stem.startswith("quickstart"):
        return
    assert NOT_RUN in text and len(WORLD.findall(text)) == 1
    assert config.training.output == f"runs/{path.stem}"


def planned_memory(config: RunConfig, gpus: int) -> str:
    """The sentence about memory that the comment of an example has."""
    sizes = find_model(config.model.path).sizes
    plan = Plan.of(RunSizes.of(config, sizes, gpus, Assumptions()), DEVICES["h100"])
    largest = plan.largest
    where = f"a GPU of stage {largest.stage}" if config.layout.pipeline > 1 else "each GPU"
    amounts = {
        "weights": largest.weights + largest.adapters + largest.head_copies,
        "gradients and optimizer": largest.gradients + largest.optimizer,
        "activations": largest.activations + largest.temporaries,
    }
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in amounts.items())
    total = f"Planned, not measured: {largest.total / 1e9:.1f} GB on {where}"
    return f"{total} ({parts}, and margins; docs/plan.md)."


@each_example
def test_memory_in_comments_equals_the_plan(path: Path) -> None:
    if NOT_RUN not in (text := path.read_text()):
        return
    if read(path).layout.context > 1 and "Planned, not measured" not in text:
        return
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines())
    sentences = {planned_memory(read(path), world_size(words)) for words in commands(path)}
    assert all(sentence in comment for sentence in sentences), sentences


LAYERS = re.compile(r"\blayers?:? (\d+)(?: and (\d+))? of (\d+)")


@each_example
def test_layers_in_comments_equal_those_of_the_objective(path: Path) -> None:
    config, text = read(path), path.read_text()
    model = architecture(config.model.path)
    layers = resolve_layers(config.objective.layers, model.num_layers)
    for first, second, of in LAYERS.findall(text):
        assert int(of) == model.num_layers
        assert tuple(int(layer) for layer in (first, second) if layer) == layers


def test_the_sdpo_example_has_the_steps_of_the_paper() -> None:
    """OpenOrca before UltraFeedback; each step starts from the one before, its reference."""
    config = read(EXAMPLES / "sdpo_solar_10b.yaml")
    assert config.sdpo is not None
    sources = [
        [config.data.train[number - 1].path for number in step.sources or ()]
        for step in config.sdpo.steps
    ]
    assert [["orca" in name for name in names] for names in sources] == [[True], [False]]
    assert "ultrafeedback" in sources[1][0]
    assert config.sdpo.target == "previous"
    assert config.objective.layers == ()


def test_the_overrides_in_the_comment_of_the_sdpo_example_are_valid() -> None:
    path = EXAMPLES / "sdpo_solar_10b.yaml"
    [overrides] = re.findall(r"^ +# (sdpo\.order=.*)$", path.read_text(), re.M)
    config = load_config(path, shlex.split(overrides), optional=SECTIONS)
    assert config.sdpo is not None
    assert config.sdpo.takes_whole_sources
