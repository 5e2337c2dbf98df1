"""LoRA adapters in PEFT's file format, from and to any parallel layout.

    save_peft(adapters, architecture, Path("adapter"), base_model="meta-llama/Llama-3.1-8B")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(...), "adapter")

Every projection has its own A and B here as in PEFT, so values are moved without arithmetic.

`adapter_config.json` has options that `LoraConfig` cannot express. Those that would change the
model's output are errors by name, so that no adapter is silently read as another one. Fields about
an adapter's origin or initialization are ignored.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.checkpoint.dtypes import check_floating, check_range
from megatron_idpo.checkpoint.model_directory import copy_companions
from megatron_idpo.config.lora import ALL_LINEAR, EXPERT_PARAMETERS, PROJECTIONS, LoraConfig
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.safetensors_file import TensorSpec
from megatron_idpo.convert.hf_io.writer import HfWriter, write_together
from megatron_idpo.convert.slicing import Shard
from megatron_idpo.errors import CheckpointError, ConfigError, Problem
from megatron_idpo.lora.adapters import Adapters, expert_target, hf_module, weight_shape
from megatron_idpo.lora.expert_tensors import expert_module, gather_whole, read_experts
from megatron_idpo.mcore.lora.chunk import AdapterTensor
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, rank_coordinates
from megatron_idpo.mcore.parallel.world import broadcast_from_rank0, raise_on_all_ranks
from megatron_idpo.storage.provenance import as_problems, diff, read_record

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"

_PEFT_ROOT = "base_model.model"
"""PEFT's wrapper, and the model in it."""

_READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
_READ |= {"use_rslora", "init_lora_weights", "exclude_modules", "target_parameters"}

_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",  # only meaningful with layers_to_transform
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # only meaningful with use_qalora
    "revision",
    "runtime_config",
}

_NEUTRAL_VALUES = {"bias": "none"}
"""Values that switch an option off, for options where that is not null, false or empty."""

_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not change the base model's weights."""


def save_peft(
    adapters: Adapters,
    architecture: Architecture,
    directory: Path,
    base_model: str,
    *,
    companions: Sequence[Path] = (),
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`. Collective.

    The first data-parallel replica writes, one tensor at a time, each pipeline stage its own
    layers. Values keep the adapters' dtype.

    Args:
        adapters: of this rank's chunks.
        architecture: of the model.
        directory: appears only when it is complete; an existing adapter is replaced.
        base_model: where PEFT finds the base model: a directory or a name on the hub, written as
            it is.
        companions: generation config and tokenizer files to copy; used on rank 0.

    Raises:
        CheckpointError: on every rank; it cannot be written, and nothing is left behind.
    """
    shapes = peft_shapes(adapters.settings, architecture)
    # From rank 0: a later stage may own no layer, and every rank needs the same dtype.
    dtype = broadcast_from_rank0(lambda: next(adapters.parameters())[1].dtype)
    config = peft_config(adapters.settings, base_model)

    def add_config(incomplete: Path) -> None:
        copy_companions(companions, incomplete)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (incomplete / CONFIG_NAME).write_text(text, encoding="utf-8")

    writer = HfWriter(
        directory,
        [TensorSpec(name, shape, dtype) for name, shape in shapes.items()],
        token=broadcast_from_rank0(lambda: uuid4().hex[:8]),
        single_file=WEIGHTS_NAME,
        max_shard_bytes=sys.maxsize,
        checksums=True,
        overwrite=True,
    )
    write_together(writer, whole_adapter_tensors(adapters), add_config)


def load_peft(adapters: Adapters, architecture: Architecture, directory: Path) -> None:
    """Load an adapter saved by PEFT or `save_peft`, casting to the adapters' dtype.

    Each rank reads its own slices. Collective only in that a failure on any rank is raised on all.

    Args:
        adapters: of this rank's chunks.
        architecture: of the model.
        directory: with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        CheckpointError: other rank, scale or targets than the adapters', an unsupported option, a
            missing, unknown or wrong-shaped tensor, a damaged file.
    """
    coordinates = rank_coordinates()
    shard = Shard(coordinates.tp_rank, coordinates.tp_size)
    with raise_on_all_ranks("reading the adapter"), torch.no_grad():
        check_same_adapter(read_peft_settings(directory), adapters.settings, directory)
        checkpoint = _open(directory)
        checkpoint.check(peft_shapes(adapters.settings, architecture))
        checkpoint.verify(share=dist.get_rank(), shares=dist.get_world_size())
        dtypes = {name: checkpoint.dtype(name) for name in checkpoint.names()}
        check_floating(str(directory), dtypes)
        for tensor in adapters.tensors():
            name = tensor_name(tensor, adapters.settings)
            if tensor.is_expert:
                read_experts(tensor, checkpoint, name, coordinates)
            else:
                slices = [
                    shard.of(size) if dim == tensor.split_dim else None
                    for dim, size in enumerate(checkpoint.shape(name))
                ]
                tensor.parameter.copy_(checkpoint.read(name, *slices))
            check_range(str(directory), name, tensor.parameter, dtypes[name])


def peft_name(module: str, side: str) -> str:
    """Name of A or B of a module in `adapter_model.safetensors`."""
    return f"{_PEFT_ROOT}.{module}.lora_{side}.weight"


def tensor_name(tensor: AdapterTensor, settings: LoraConfig) -> str:
    """Name of a whole tensor in `adapter_model.safetensors`."""
    if tensor.is_expert:
        module = expert_module(tensor.layer, tensor.projection, settings)
    else:
        module = hf_module(tensor.layer, tensor.projection)
    return peft_name(module, tensor.side)


def peft_shapes(settings: LoraConfig, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Shapes of an adapter's whole tensors by PEFT's names, in layer order.

    A is `[rank, inputs]`, B is `[outputs, rank]`; those of experts have the rank of all of them.
    """
    shapes = {}
    for layer in range(architecture.num_layers):
        modules: list[tuple[str, str, int]] = []
        for name in settings.projections:
            modules.append((hf_module(layer, name), name, settings.rank))
        for target in map(expert_target, settings.expert_parameters):
            module = expert_module(layer, target, settings)
            modules.append((module, target, settings.rank * architecture.num_experts))
        for module, target, rank in modules:
            outputs, inputs = weight_shape(target, architecture)
            shapes[peft_name(module, "A")] = (rank, inputs)
            shapes[peft_name(module, "B")] = (outputs, rank)
    return shapes


def whole_adapter_tensors(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """This stage's whole tensors under PEFT's names, one at a time, in the adapters' dtype.

    Yields on the first rank of a replica's tensor-parallel (and, for experts, expert-parallel)
    ranks only. Collective over these groups: a gather for every split tensor.
    """
    coordinates = rank_coordinates()
    for tensor in adapters.tensors():
        if coordinates.replica(is_expert=tensor.is_expert) > 0:
            continue
        whole = gather_whole(tensor) if tensor.is_expert else _gather_projection(tensor)
        if whole is not None:
            yield tensor_name(tensor, adapters.settings), whole


def _gather_projection(tensor: AdapterTensor) -> Tensor | None:
    local = tensor.parameter.detach()
    if tensor.split_dim is None:
        return local if rank_coordinates().tp_rank == 0 else None
    shards = gather_tensor_shards(local)
    return None if shards is None else torch.cat(shards, tensor.split_dim)


def _open(directory: Path) -> HfCheckpoint:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        message, remedy = "does not exist", "name the directory that PEFT's save_pretrained wrote"
        if (directory / _PICKLE_NAME).is_file():
            message = f"does not exist, only {_PICKLE_NAME}, which could run any code when loaded"
            remedy = "if you trust that file, load it with PEFT and save it again"
        raise CheckpointError.at(str(path), message, remedy)
    return HfCheckpoint(directory, single_file=WEIGHTS_NAME)


# ---- adapter_config.json -------------------------------------------------------------------------


def read_peft_settings(directory: Path) -> LoraConfig:
    """Read the settings of an adapter that PEFT saved.

    Args:
        directory: with `adapter_config.json`.

    Raises:
        CheckpointError: missing, not LoRA, or with unsupported options; all of them at once.
    """
    path = directory / CONFIG_NAME
    remedy = "name the directory that PEFT's save_pretrained wrote"
    config = read_record(path, error=CheckpointError, remedy=remedy)
    problems = _unsupported(config, str(path))
    targets = config.get("target_modules") or []
    if not problems and targets:
        targets, problems = _without_excluded(config, path)
    if problems:
        raise CheckpointError.of(problems)
    try:
        return LoraConfig(
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=targets,
            target_parameters=_expert_parameters(config),
            rslora=bool(config.get("use_rslora", False)),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError.at(str(path), f"does not describe an adapter: {error}") from None


def _expert_parameters(config: dict[str, Any]) -> list[str]:
    """The weights of experts that `target_parameters` names.

    Source: `peft.tuners.tuners_utils._inject_parameters`: an entry is a name, or the end of one.
    """
    targets = config.get("target_parameters") or []
    return [
        name
        for name in EXPERT_PARAMETERS
        if isinstance(targets, list) and any(f".{name}".endswith(f".{end}") for end in targets)
    ]


def _without_excluded(config: dict[str, Any], path: Path) -> tuple[Any, list[Problem]]:
    """`target_modules` without the projections that `exclude_modules` excludes in every layer.

    Source: `peft.tuners.tuners_utils.check_target_module_exists`: a string is a regular expression
    of the whole module name; an entry of a list is a name, or the end of one.
    """
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if not excluded:
        return targets, []
    pattern = excluded
    if not isinstance(excluded, str):
        pattern = rf"(?:.*\.)?(?:{'|'.join(re.escape(str(name)) for name in excluded)})"
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        message = f"{excluded!r} is not a regular expression: {error}"
        return targets, [Problem(f"{path}: exclude_modules", message, "correct it")]
    kept, mixed = [], []
    for target in PROJECTIONS if targets == ALL_LINEAR else targets:
        hits = {matches(hf_module(layer, target)) is not None for layer in range(_num_layers(path))}
        if len(hits) > 1:
            mixed.append(target)
        elif hits == {False}:
            kept.append(target)
    if mixed:
        message = f"is {excluded!r}, which excludes {', '.join(mixed)} in some layers only"
        remedy = "merge the adapter into its base model with PEFT"
        return targets, [Problem(f"{path}: exclude_modules", message, remedy)]
    return targets if len(kept) == len(targets) else kept, []


def _num_layers(config_path: Path) -> int:
    """One more than the last layer with an adapter."""
    found = (re.search(r"\.layers\.(\d+)\.", name) for name in _open(config_path.parent).names())
    return 1 + max((int(match[1]) for match in found if match), default=0)


def check_same_adapter(saved: LoraConfig, current: LoraConfig, directory: Path) -> None:
    """Check that a saved adapter fits the model's adapters; dropout may differ.

    Raises:
        CheckpointError: naming every differing field.
    """
    differences = diff(_fields_that_must_match(saved), _fields_that_must_match(current))
    remedy = "make the section lora and the adapter equal"
    if problems := as_problems(differences, str(directory / CONFIG_NAME), remedy):
        raise CheckpointError.of(problems)


def _fields_that_must_match(settings: LoraConfig) -> dict[str, Any]:
    return {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": list(settings.projections),
        "target_parameters": list(settings.expert_parameters) or None,
    }


def peft_config(settings: LoraConfig, base_model: str) -> dict[str, Any]:
    """The content of `adapter_config.json` for `PeftModel.from_pretrained`.

    Args:
        settings: of the adapter.
        base_model: where PEFT finds the base model: a directory or a name on the hub.
    """
    return {
        **_fields_that_must_match(settings),
        # PEFT declares an int, but computes with any number.
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _unsupported(config: dict[str, Any], path: str) -> list[Problem]:
    """Every field with a value that is not supported."""
    problems = []

    def add(name: str, message: str, remedy: str = "") -> None:
        problems.append(Problem(f"{path}: {name}", message, remedy))

    for name, accepted in (("peft_type", ("LORA",)), ("task_type", (None, "CAUSAL_LM"))):
        if config.get(name) not in accepted:
            add(name, f"is {config.get(name)!r}, only {accepted[-1]} is supported")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        add("target_modules", f"is the pattern {targets!r}", "list the projections")
    elif not isinstance(targets, str | list) and not (
        targets is None and _expert_parameters(config)
    ):
        add("target_modules", f"is {targets!r}", "list the projections")
    parameters = config.get("target_parameters")
    if parameters and len(_expert_parameters(config)) != len(parameters):
        supported = " and ".join(EXPERT_PARAMETERS)
        add("target_parameters", f"is {parameters!r}, only {supported} are supported")
    initialization = config.get("init_lora_weights")
    if initialization not in _PLAIN_INITIALIZATIONS:
        add(
            "init_lora_weights",
            f"is {initialization!r}, which also changes the base model's weights",
            "save it with PEFT as plain LoRA (path_initial_model_for_weight_conversion)",
        )
    for name, value in sorted(config.items()):
        is_off = not value or value == _NEUTRAL_VALUES.get(name)
        if name not in _READ | _IGNORED and not is_off:
            remedy = "merge the adapter into its base model with PEFT"
            add(name, f"is {value!r}, which is not supported", remedy)
    return problems
