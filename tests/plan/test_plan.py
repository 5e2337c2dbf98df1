"""The verb `plan`: output, refusals, search, advice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.cli.main import main
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.plan.choices import balanced_split, cheapest_recompute, fits
from megatron_idpo.plan.devices import DEVICES
from megatron_idpo.plan.memory import run_memory
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes
from megatron_idpo.plan.search import nearest_that_fits, search

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = DEVICES["h100"]


def run_of(example: str, gpus: int, *overrides: str) -> RunSizes:
    config = load_config(EXAMPLES / f"{example}.yaml", overrides, optional=SECTIONS)
    return RunSizes.of(config, find_model(config.model.path).sizes, gpus, Assumptions())


def planned(capsys: Any, *words: str) -> Any:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_stages_time_and_verdict(capsys):
    path = str(EXAMPLES / "llama3_70b_full.yaml")
    plan = planned(capsys, path, "--gpus", "64", "--device", "h200")
    assert plan["fits"] and plan["step_s"] > 0 and plan["layout"]["data"] == 2
    assert [stage["taps"] for stage in plan["stages"]] == [[], [], [55], []]
    for stage in plan["stages"]:
        assert 20e9 < stage["peak_bytes"] < plan["device_bytes"]
        assert stage["components_bytes"]["weights"] > 4e9


def test_text_names_components_margins_and_what_is_assumed(capsys):
    assert main(["plan", str(EXAMPLES / "llama3_70b.yaml"), "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    for part in ("70.6 B parameters", "table of known models", "fragmentation, 5%", "NCCL", "Fits"):
        assert part in text
    assert "roofline estimate, not measured" in text and "800 positions per pair" in text


def test_a_plan_imports_no_torch_and_takes_two_seconds():
    program = "import sys; from megatron_idpo.cli.main import main; code = main(sys.argv[1:]); "
    program += "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules); sys.exit(code)"
    words = [sys.executable, "-c", program, "plan", str(EXAMPLES / "llama3_70b.yaml"), "--gpus"]
    subprocess.run([*words, "64"], check=True, capture_output=True)


def test_what_does_not_fit_is_refused_with_the_fastest_layout_that_does(capsys):
    path = str(EXAMPLES / "llama3_8b_full.yaml")
    overrides = ["layout.tensor=1", "layout.sequence_parallel=false", "data.row_tokens=8192"]
    assert main(["plan", path, *overrides, "--gpus", "8"]) == 2
    error = capsys.readouterr().err
    assert "a GPU needs" in error and "layout.tensor=" in error


def test_a_model_that_fits_in_no_layout_is_refused_with_the_nearest_that_do(capsys):
    path = str(EXAMPLES / "llama3_70b_full.yaml")
    assert main(["plan", path, "--gpus", "8", "--search"]) == 2
    error = capsys.readouterr().err
    assert "no layout fits 8 × H100" in error
    assert "GPUs: layout." in error and "LoRA on these GPUs" in error


def test_what_is_named_as_the_nearest_fits():
    run = run_of("llama3_70b_full", 32)
    small = RunSizes.of(
        load_config(EXAMPLES / "llama3_70b_full.yaml", ["layout=null"], optional=SECTIONS),
        run.model, 8, Assumptions(),
    )  # fmt: skip
    first = nearest_that_fits(small, H100)[0]
    gpus = int(first.split()[0])
    words = first.split(": ")[1].replace("'", "").split()
    assert gpus > 8 and not search(small, H100)
    config = load_config(EXAMPLES / "llama3_70b_full.yaml", ["layout=null"], optional=SECTIONS)
    again = load_config(EXAMPLES / "llama3_70b_full.yaml", words, optional=SECTIONS)
    assert config.layout != again.layout
    assert Plan.of(RunSizes.of(again, run.model, gpus, Assumptions()), H100).fits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus: is 0"),
        (["--device", "h10", "--gpus", "8"], "did you mean h100"),
        (["--gpus", "12"], "do not divide the world of 12"),
        (["model.path=org/unknown", "--gpus", "64"], "hf download org/unknown config.json"),
    ],
)
def test_errors_name_a_remedy(capsys, words, message):
    assert main(["plan", str(EXAMPLES / "llama3_70b.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("example", "gpus", "overrides"),
    [
        ("llama3_8b", 1, ["layout=null"]),
        ("llama3_8b_full", 8, ["layout=null"]),
        ("llama3_70b_full", 64, ["layout=null"]),
        ("llama3_8b", 16, ["layout=null", "model.path=mistralai/Mixtral-8x7B-Instruct-v0.1"]),
    ],
)
def test_everything_that_a_search_finds_fits_and_is_sorted(example, gpus, overrides):
    found = search(run_of(example, gpus, *overrides), H100)
    assert found and all(one.plan.fits for one in found)
    steps = [one.plan.time.step for one in found]
    assert steps == sorted(steps)
    # Its settings, as overrides, give the same plan.
    words = [word.replace("'", "") for line in found[-1].settings for word in line.split()]
    again = run_of(example, gpus, *overrides[1:], "layout=null", *words)
    assert Plan.of(again, H100).largest.total == found[-1].plan.largest.total


def test_the_cheapest_recomputation_fits_and_one_layer_less_does_not():
    run = run_of("llama3_8b_full", 8, "layout=null", "data.row_tokens=8192", "layout.tensor=2")
    smaller = type(H100)(**{**H100_FIELDS, "memory_bytes": 60e9})
    choice = cheapest_recompute(run, smaller)
    assert choice is not None and choice.run.recompute_layers is not None
    layers = choice.run.recompute_layers
    assert 1 < layers < 32
    less = RunSizes(**{**fields_of(choice.run), "recompute_layers": layers - 1})
    assert fits(run_memory(choice.run, smaller), smaller)
    assert not fits(run_memory(less, smaller), smaller)


def fields_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


H100_FIELDS = fields_of(H100)


def test_the_balanced_split_gives_stages_with_heads_fewer_layers():
    run = run_of("qwen2_5_7b", 8, "layout={pipeline: 4}", "objective.layers=[10, 12, 13]")
    choice = balanced_split(run, H100)
    assert choice is not None
    split = choice.run.layout.pipeline_layers
    assert split is not None and sum(split) == 28
    assert split[3] < split[0]
    assert Plan.of(choice.run, H100).time.step < Plan.of(run, H100).time.step
    assert choice in Plan.of(run, H100).advice()
