"""Whether a configuration can run on this machine: its model, layout, memory, data and output.

Only headers and config.json are read: no weights, no network. Memory on GPUs, or of a model that is
not here, is planned (`plan/`). On a CPU it is a lower bound: the weights and, for training all of
them, the state of Adam.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.doctor.finding import Finding, State
from megatron_idpo.doctor.machine import Machine, format_size, nearest_existing
from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.plan.devices import DEVICES, Device, device_of
from megatron_idpo.plan.models import find_model
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.architecture import Architecture

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TRAINED_BYTES = {"fp32": 12, "bf16": 16, "fp16": 16}
"""Bytes per trained parameter in addition to its weight: an fp32 gradient, Adam's two fp32 moments
and, for 16-bit weights, an fp32 main copy. The distributed optimizer shards all but the gradient
over data- and context-parallel ranks."""

GRADIENT_BYTES = 4
PLAN = "plan"
"""The name of the finding about planned memory, which the summary repeats."""

DATA_FILE = re.compile(r"\.(jsonl?|parquet|csv|arrow)(\.gz)?$")


def check_config(
    path: str | Path, overrides: Sequence[str], machine: Machine, environ: Mapping[str, str]
) -> list[Finding]:
    """All checks of a configuration that need no run.

    Args:
        path: the YAML file.
        overrides: `section.field=value`.
        machine: where it is to run.
        environ: `WORLD_SIZE` is the number of processes that a launcher has started.
    """
    try:
        config = load_config(path, overrides, optional=SECTIONS)
    except UserError as error:
        return [Finding("configuration", State.BROKEN, str(error))]
    findings = [Finding("configuration", State.OK, f"{path} is valid")]
    architecture, is_elsewhere = None, False
    if config.has("model"):
        architecture, finding = _model(config.model.path)
        is_elsewhere = finding.state is State.UNCHECKED
        findings.append(finding)
    world_size = _world_size(config.layout, machine, environ)
    problems = config.layout.problems_for(architecture, world_size or None)
    if problems:
        findings.append(Finding("layout", State.BROKEN, "\n".join(map(str, problems))))
    else:
        is_launched = "WORLD_SIZE" in environ
        findings.append(_layout(config, machine, world_size, is_launched=is_launched))
        if architecture is not None:
            findings.append(_memory(config, architecture, machine, world_size))
        if is_elsewhere or (machine.gpus and architecture is not None):
            findings += _plan(config, machine, world_size)
    if config.has("data"):
        sources = (*config.data.train, *(config.data.eval or ()))
        findings.append(_data([source.path for source in sources]))
    if config.has("training"):
        findings.append(_output(Path(config.training.output)))
    return findings


def _model(path: str) -> "tuple[Architecture | None, Finding]":
    """The architecture, if the model is on this machine, and the finding about it."""
    directory: Path | None = Path(path)
    if not Path(path).is_dir():
        if Path(path).exists() or len(Path(path).parts) > 2 or path.startswith((".", "~", "/")):
            remedy = "give the directory of a model, or a hub name such as organization/model"
            message = f"{path} is not a directory"
            return None, Finding("model", State.BROKEN, message, "", remedy)
        directory = _cached_snapshot(path)
    if directory is None:
        if (parent := Path(path).parent) != Path() and parent.is_dir():
            message, remedy = f"no such directory: {path}", f"{parent} exists: check model.path"
            return None, Finding("model", State.BROKEN, message, "", remedy)
        message = f"{path} is neither a directory nor a downloaded model of the hub"
        remedy = f"correct model.path, or, if it is a hub name: hf download {path}"
        return None, Finding("model", State.UNCHECKED, message, "", remedy)
    try:
        architecture = _read_architecture(directory)
    except (UserError, ImportError, OSError) as error:
        return None, Finding("model", State.BROKEN, str(error))
    message = f"{architecture.family}, {architecture.num_layers} layers, "
    if architecture.num_experts:
        message += f"{architecture.experts_per_token} of {architecture.num_experts} experts, "
    message += f"{_num_parameters(architecture):,} parameters"
    if architecture.unread_keys:
        message += f"; config.json: {architecture.unread_note}"
    return architecture, Finding("model", State.OK, message)


def _cached_snapshot(name: str) -> Path | None:
    """Directory of a model in the cache of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def _read_architecture(directory: Path) -> "Architecture":
    """The architecture of a checkpoint; also checks the headers of Hugging Face weights."""
    from megatron_idpo.convert.families import LEGACY_TENSORS, expected_tensors, fused_experts
    from megatron_idpo.convert.hf_io.reader import HfCheckpoint
    from megatron_idpo.convert.hf_io.tokenizer_files import read_json_object
    from megatron_idpo.mcore.model.architecture import Architecture

    is_megatron = (directory / "metadata.json").is_file()
    path = directory / ("huggingface/config.json" if is_megatron else "config.json")
    architecture = Architecture.from_hf(read_json_object(path), str(path))
    if not is_megatron:
        checkpoint = HfCheckpoint(directory)
        if architecture.num_experts:
            checkpoint.split(fused_experts(architecture, checkpoint.names()))
        checkpoint.check(expected_tensors(architecture, checkpoint.names()), LEGACY_TENSORS)
        checkpoint.check_vocabulary()
    return architecture


def _num_parameters(architecture: "Architecture", *, experts: bool = False) -> int:
    """Of the whole model, or of its experts."""
    from megatron_idpo.convert.families import hf_shapes

    shapes = hf_shapes(architecture).items()
    return sum(math.prod(shape) for name, shape in shapes if not experts or ".experts." in name)


def _layout(config: RunConfig, machine: Machine, world_size: int, *, is_launched: bool) -> Finding:
    """A layout that fits the model, compared to the processes and GPUs of the machine."""
    layout = config.layout
    if not world_size:
        needed, gpus = layout.min_ranks, len(machine.gpus)
        message = f"one model replica needs {needed} GPUs, this machine has {gpus}"
        remedy = f"run it on {-(-needed // gpus)} such machines, or lower layout.tensor or "
        remedy += "layout.pipeline" if layout.context == 1 else "layout.context"
        return Finding("layout", State.BROKEN, message, "", remedy)
    product = f"tensor {layout.tensor} × pipeline {layout.pipeline} × "
    if layout.context > 1:
        product += f"context {layout.context} × "
    product += f"data {layout.data(world_size)}"
    if layout.expert > 1:
        product += f", experts over {layout.expert},"
    message = f"{product} on {world_size} {'process' if world_size == 1 else 'processes'}"
    if layout.context > 1 and config.has("data"):
        message += f", {config.data.row_tokens // layout.context:,} positions of a row on each"
    if is_launched:
        return Finding("layout", State.OK, message)
    start = "" if world_size == 1 else f"start it with --processes {world_size}"
    consequence = ""
    if len(machine.gpus) > world_size:
        consequence = f"{len(machine.gpus) - world_size} GPUs would be idle"
    if not machine.gpus and world_size > machine.cores:
        consequence = f"they share {machine.cores:g} cores: correct, but slow"
    return Finding("layout", State.NOTE if consequence else State.OK, message, consequence, start)


def _world_size(layout: Layout, machine: Machine, environ: Mapping[str, str]) -> int:
    """Processes: as launched, or as many replicas as fit on the GPUs; 0 if not even one fits."""
    if "WORLD_SIZE" in environ:
        return int(environ["WORLD_SIZE"])
    gpus = len(machine.gpus)
    return gpus - gpus % layout.min_ranks if gpus else layout.min_ranks


def _memory(
    config: RunConfig, architecture: "Architecture", machine: Machine, world_size: int
) -> Finding:
    """The memory of the weights, and of training all of them, compared to the machine's."""
    layout, dtype, name = config.layout, config.model.dtype, "weights"
    experts = _num_parameters(architecture, experts=True)
    # Parameters and the ranks that one copy is split over; each rank has as much of every copy.
    # Context-parallel ranks have the same weights, like data-parallel ones.
    groups = (
        (_num_parameters(architecture) - experts, layout.tensor * layout.pipeline),
        (experts, layout.expert_model_ranks),
    )
    num_ranks = world_size or layout.min_ranks
    if machine.gpus:
        # A lower bound: stages with the embedding or more layers than others hold more.
        held_by = 1
        available, where = min(size for _, size in machine.gpus), "a GPU"
    else:
        # All processes share the memory of the machine.
        held_by = num_ranks
        available, where = machine.memory_bytes, "the machine, over all processes"
    sharded = TRAINED_BYTES[dtype] - GRADIENT_BYTES
    weights = training = 0.0
    for parameters, ranks in groups:
        held = parameters / ranks * held_by
        weights += held * WEIGHT_BYTES[dtype]
        optimizer = sharded / (num_ranks // ranks)
        training += held * (WEIGHT_BYTES[dtype] + GRADIENT_BYTES + optimizer)
    message = f"{format_size(weights)} in {dtype}; {where} has {format_size(available)}"
    consequence = f"training all weights with Adam takes {format_size(training)} plus activations"
    remedy = "raise layout.tensor or layout.pipeline"
    if architecture.num_experts:
        remedy = "raise layout.expert, layout.tensor or layout.pipeline"
    if weights > available:
        remedy = f"{remedy}, or use a smaller model"
        return Finding(name, State.BROKEN, message, "they do not fit", remedy)
    if training > available:
        consequence = f"{consequence}, which does not fit"
        return Finding(name, State.NOTE, message, consequence, f"use LoRA, or {remedy}")
    return Finding(name, State.OK, message, consequence)


def _plan(config: RunConfig, machine: Machine, world_size: int) -> list[Finding]:
    """The memory of a GPU; nothing without the sections or the sizes that it depends on."""
    if not all(config.has(section) for section in ("model", "data", "optimizer", "training")):
        return []
    try:
        model = find_model(config.model.path)
        run = RunSizes.of(config, model.sizes, world_size, Assumptions())
    except ConfigError:
        return []
    plan = Plan.of(run, _device(machine))
    name = plan.device.name.removesuffix(" 80 GB").removesuffix(" SXM")
    message = f"{model.sizes.parameters / 1e9:.1f} B parameters, "
    message += f"{plan.largest.total / 1e9:.0f} GB per GPU on {world_size} × {name}"
    if plan.fits:
        return [Finding(PLAN, State.OK, message)]
    consequence = f"does not fit into {plan.device.memory_bytes / 1e9:.0f} GB"
    remedy = f"megatron-idpo plan CONFIG.yaml --gpus {world_size} --search"
    return [Finding(PLAN, State.NOTE, message, consequence, remedy)]


def _device(machine: Machine) -> Device:
    """The smallest GPU of this machine; without any, an H100."""
    if not machine.gpus:
        return DEVICES["h100"]
    name, size = min(machine.gpus, key=lambda gpu: gpu[1])
    device = device_of(name) or DEVICES["h100"]
    return replace(device, name=name.removeprefix("NVIDIA "), memory_bytes=size)


def _data(paths: Sequence[str]) -> Finding:
    absent = [path for path in paths if not Path(path).exists()]
    if missing := [path for path in absent if _is_file_path(path)]:
        message, remedy = f"no such file: {', '.join(missing)}", "check data.train and data.eval"
        return Finding("data", State.BROKEN, message, "", remedy)
    state = State.UNCHECKED if absent else State.OK
    return Finding("data", state, ", ".join(paths))


def _is_file_path(path: str) -> bool:
    """Whether a source can only be a file, not a pattern or a hub name."""
    if any(letter in path for letter in "*?["):
        return False
    return bool(DATA_FILE.search(path)) or path.startswith((".", "/", "~"))


def _output(directory: Path) -> Finding:
    parent = nearest_existing(directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        message = f"{directory} cannot be written: {parent} is not a writable directory"
        return Finding("output", State.BROKEN, message, "", "change training.output")
    return Finding("output", State.OK, f"{directory} can be written")
