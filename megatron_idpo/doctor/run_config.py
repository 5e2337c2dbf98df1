"""Whether one configuration can run on this machine: its model, layout, memory, data and output.

Only headers and config.json are read, no weight, no network. The memory told here is a lower bound,
the weights and, for training all of them, what Adam adds; activations are not estimated.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.config.run_config import SECTIONS, RunConfig, load_config
from megatron_idpo.config.sections import SourceConfig
from megatron_idpo.doctor.finding import Finding, State
from megatron_idpo.doctor.machine import Machine, nearest_existing, size_of
from megatron_idpo.errors import CheckpointError, UserError
from megatron_idpo.mcore.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.architecture import Architecture

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TRAINED_BYTES = {"fp32": 12, "bf16": 16, "fp16": 16}
"""What training adds per parameter: an fp32 gradient, Adam's two fp32 moments and, for weights that
are not fp32 themselves, an fp32 copy. The distributed optimizer shares all but the gradient over
data-parallel ranks."""

GRADIENT_BYTES = 4
DATA_FILE = re.compile(r"\.(jsonl?|parquet|csv|arrow)(\.gz)?$")
CONFIG_FILES = ("config.json", "huggingface/config.json")
"""Of a Hugging Face directory, and of our Megatron checkpoints."""


def examine_config(
    path: str | Path, overrides: Sequence[str], machine: Machine, environ: Mapping[str, str]
) -> list[Finding]:
    """Everything about a configuration that can be known without running it.

    Args:
        path: the YAML file.
        overrides: `section.field=value`.
        machine: where it is to run.
        environ: `WORLD_SIZE` says how many processes a launcher has started.
    """
    try:
        config = load_config(path, overrides, optional=SECTIONS)
    except UserError as error:
        return [_refused("configuration", error)]
    found = [Finding("configuration", State.OK, f"{path} is valid")]
    architecture = None
    if config.has("model"):
        architecture, finding = _model(config.model.path)
        found.append(finding)
    found.append(_layout(config.layout.layout(), architecture, machine, environ))
    if architecture is not None:
        found.append(_memory(config, architecture, machine, environ))
    if config.has("data"):
        found.append(_data((*config.data.train, *(config.data.eval or ()))))
    if config.has("training"):
        found.append(_output(Path(config.training.output)))
    return found


def _refused(name: str, error: Exception) -> Finding:
    return Finding(name, State.BROKEN, str(error))


def _model(path: str) -> "tuple[Architecture | None, Finding]":
    """The architecture, if it can be known here, and what is to be said about the model."""
    directory = Path(path)
    if not directory.is_dir():
        if directory.exists() or len(Path(path).parts) > 2 or path.startswith((".", "~", "/")):
            remedy = "give a model's directory, or a hub name such as organisation/model"
            return None, Finding("model", State.BROKEN, f"{path} is no directory", "", remedy)
        cached = _cached_snapshot(path)
        if cached is None:
            message = f"{path} is not on this machine, so it was not looked at"
            remedy = f"download it: hf download {path}"
            return None, Finding("model", State.NOTE, message, "", remedy)
        directory = cached
    try:
        architecture = _architecture(directory)
        _check_weights(directory, architecture)
    except (UserError, ImportError, OSError) as error:
        return None, _refused("model", error)
    count = sum(_parameters_by_layer(architecture).values())
    message = f"{architecture.family}, {architecture.num_layers} layers, {count:,} parameters"
    return architecture, Finding("model", State.OK, message)


def _cached_snapshot(name: str) -> Path | None:
    """Where the hub's cache has a model, if it does."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _architecture(directory: Path) -> "Architecture":
    from megatron_idpo.mcore.model.architecture import Architecture

    for name in CONFIG_FILES:
        path = directory / name
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
                return Architecture.from_hf(config, str(path))
            except (OSError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise CheckpointError.at(str(path), f"cannot be read: {error}") from error
    raise CheckpointError.at(str(directory), "has no config.json", "it is no model's directory")


def _check_weights(directory: Path, architecture: "Architecture") -> None:
    """Read the headers of the weights; a Megatron checkpoint has only its metadata looked for."""
    from megatron_idpo.convert.families import LEGACY_TENSORS, expected_tensors
    from megatron_idpo.convert.hf_io.reader import HfCheckpoint

    if not (directory / "metadata.json").is_file():
        checkpoint = HfCheckpoint(directory)
        checkpoint.check(expected_tensors(architecture, checkpoint.names()), LEGACY_TENSORS)
        checkpoint.check_vocabulary()


def _parameters_by_layer(architecture: "Architecture") -> Counter[str]:
    """Parameters of each layer, by its number, and of `embed_tokens`, `norm` and `lm_head`."""
    from megatron_idpo.convert.families import hf_shapes

    counts: Counter[str] = Counter()
    for name, shape in hf_shapes(architecture).items():
        parts = name.removeprefix("model.").split(".")
        counts[parts[1] if parts[0] == "layers" else parts[0]] += math.prod(shape)
    return counts


def _layout(
    layout: Layout,
    architecture: "Architecture | None",
    machine: Machine,
    environ: Mapping[str, str],
) -> Finding:
    world_size = _world_size(layout, machine, environ)
    problems = layout.problems(architecture, world_size or None)
    if problems:
        return Finding("layout", State.BROKEN, "\n".join(map(str, problems)))
    needed = layout.model_ranks
    if not world_size:
        gpus = len(machine.gpus)
        machines = -(-needed // gpus)
        return Finding(
            "layout",
            State.BROKEN,
            f"one model takes {needed} GPUs, this machine has {gpus}",
            "",
            f"run it on {machines} such machines, or lower layout.tensor or layout.pipeline",
        )
    message = (
        f"tensor {layout.tensor} × pipeline {layout.pipeline} × data {layout.data(world_size)} "
        f"on {world_size} {'process' if world_size == 1 else 'processes'}"
    )
    start = "" if world_size == 1 else f"start it with torchrun --nproc-per-node {world_size}"
    if "WORLD_SIZE" in environ:
        return Finding("layout", State.OK, message)
    if machine.gpus and world_size < len(machine.gpus):
        idle = len(machine.gpus) - world_size
        return Finding("layout", State.NOTE, message, f"{idle} GPUs would be idle", start)
    if not machine.gpus and world_size > machine.cores:
        slow = f"they share {machine.cores:g} cores: right, but slow"
        return Finding("layout", State.NOTE, message, slow, start)
    return Finding("layout", State.OK, message, "", start)


def _world_size(layout: Layout, machine: Machine, environ: Mapping[str, str]) -> int:
    """Processes: as launched, else as many models as the GPUs hold, else one; 0 if none fits."""
    if "WORLD_SIZE" in environ:
        return int(environ["WORLD_SIZE"])
    gpus = len(machine.gpus)
    return gpus - gpus % layout.model_ranks if gpus else layout.model_ranks


def _memory(
    config: RunConfig, architecture: "Architecture", machine: Machine, environ: Mapping[str, str]
) -> Finding:
    """The weights, and what training all of them would take, against what there is."""
    layout, dtype = config.layout.layout(), config.model.dtype
    world_size = _world_size(layout, machine, environ)
    if layout.problems(architecture, world_size or None):
        return Finding("weights", State.NOTE, "not estimated: the layout has to work first")
    largest, total = _parameters_per_process(architecture, layout)
    data = layout.data(world_size) if world_size else 1
    if machine.gpus:
        parameters, available = largest, min(size for _, size in machine.gpus)
        where = "GPU"
    else:
        parameters, available = total * data, machine.memory_bytes
        where = "machine, over all processes"
    weights = parameters * WEIGHT_BYTES[dtype]
    shared = TRAINED_BYTES[dtype] - GRADIENT_BYTES
    training = weights + parameters * (GRADIENT_BYTES + shared / data)
    message = f"{size_of(weights)} in {dtype} of the {size_of(available)} of a {where}"
    more = f"training all of them with Adam takes {size_of(training)} before activations"
    if weights > available:
        remedy = "raise layout.tensor or layout.pipeline, or use a smaller model"
        return Finding("weights", State.BROKEN, message, "they do not fit", remedy)
    if training > available:
        remedy = "train adapters only, or raise layout.tensor or layout.pipeline"
        return Finding("weights", State.NOTE, message, f"{more}, which does not fit", remedy)
    return Finding("weights", State.OK, message, more)


def _parameters_per_process(architecture: "Architecture", layout: Layout) -> tuple[float, float]:
    """Parameters of the fullest process of a model, and of all its processes together."""
    counts = _parameters_by_layer(architecture)
    stages = []
    for stage in range(layout.pipeline):
        chunks = range(layout.virtual_pipeline)
        layers = [n for c in chunks for n in layout.layers(architecture.num_layers, stage, c)]
        stages.append(sum(counts[str(layer)] for layer in layers))
    stages[0] += counts["embed_tokens"]
    stages[-1] += counts["norm"]
    # A tied output layer is a copy of the embedding where the last stage is not the first.
    copied = architecture.tied_embeddings and layout.pipeline > 1
    stages[-1] += counts["embed_tokens"] if copied else counts["lm_head"]
    return max(stages) / layout.tensor, float(sum(stages))


def _data(sources: Sequence[SourceConfig]) -> Finding:
    missing = [
        source.path
        for source in sources
        if _looks_local(source.path) and not Path(source.path).exists()
    ]
    if missing:
        remedy = "check data.train and data.eval"
        return Finding("data", State.BROKEN, f"there is no {', '.join(missing)}", "", remedy)
    return Finding("data", State.OK, ", ".join(source.path for source in sources))


def _looks_local(path: str) -> bool:
    """Whether a source can only be a file: a pattern is left to the reader of the data."""
    if any(letter in path for letter in "*?["):
        return False
    return bool(DATA_FILE.search(path)) or path.startswith((".", "/", "~"))


def _output(directory: Path) -> Finding:
    parent = nearest_existing(directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        message = f"{directory} cannot be written: {parent} is no directory of yours"
        return Finding("output", State.BROKEN, message, "", "change training.output")
    return Finding("output", State.OK, f"{directory} can be written")
