"""PEFT's `adapter_config.json`: the settings of an adapter, read and written.

It has options that `LoraConfig` cannot express. Those that would change the model's output are
errors by name, so that no adapter is silently read as another one. Fields about an adapter's origin
or initialization are ignored.
"""

import re
from pathlib import Path
from typing import Any

from megatron_idpo.config.lora import ALL_LINEAR, EXPERT_PARAMETERS, PROJECTIONS, LoraConfig
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.errors import CheckpointError, ConfigError, Problem
from megatron_idpo.lora.adapters import hf_module
from megatron_idpo.lora.fused_modules import (
    all_projections,
    file_settings,
    module_names_of,
    modules_of,
    same_but_stacked,
)
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.storage.provenance import as_problems, diff, read_record

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_REMEDY = "name the directory that PEFT's save_pretrained wrote"

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


def open_adapter(directory: Path) -> HfCheckpoint:
    """The tensors of an adapter.

    Raises:
        CheckpointError: there are none that can be read without running code.
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        message, remedy = "does not exist", _REMEDY
        if (directory / _PICKLE_NAME).is_file():
            message = f"does not exist, only {_PICKLE_NAME}, which could run any code when loaded"
            remedy = "if you trust that file, load it with PEFT and save it again"
        raise CheckpointError.at(str(path), message, remedy)
    return HfCheckpoint(directory, single_file=WEIGHTS_NAME)


def read_peft_settings(directory: Path) -> LoraConfig:
    """Read the settings of an adapter that PEFT saved.

    Args:
        directory: with `adapter_config.json`.

    Raises:
        CheckpointError: missing, not LoRA, or with unsupported options; all of them at once.
    """
    path = directory / CONFIG_NAME
    config = read_record(path, error=CheckpointError, remedy=_REMEDY)
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
            targets=all_projections(targets),
            target_parameters=_expert_parameters(config),
            gate_up_rank=_gate_up_rank(config),
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


_GATE_UP = r".*\.gate_up_proj"
"""PEFT's own pattern, if `target_modules` named the gate and up projections of experts."""


def _gate_up_pattern(settings: LoraConfig, value: float) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern`, given the rank or alpha of the other targets."""
    if settings.gate_up_rank in (None, settings.rank):
        return {}
    scaled = value * settings.gate_up_rank / settings.rank
    return {_GATE_UP: int(scaled) if float(scaled).is_integer() else scaled}


def _gate_up_rank(config: dict[str, Any]) -> int | None:
    """The rank of `gate_up_proj`, if the patterns say only that, with an unchanged scale."""
    ranks, alphas = config.get("rank_pattern"), config.get("alpha_pattern")
    if not (isinstance(ranks, dict) and isinstance(alphas, dict)) or config.get("use_rslora"):
        return None
    if ranks.keys() != {_GATE_UP} or alphas.keys() != {_GATE_UP}:
        return None
    rank, alpha = ranks[_GATE_UP], alphas[_GATE_UP]
    is_same_scale = alpha * config.get("r", 8) == rank * config.get("lora_alpha", 8)
    return rank if isinstance(rank, int) and is_same_scale else None


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
        hits = {
            any(matches(hf_module(layer, name)) for name in module_names_of(target))
            for layer in range(_num_layers(path))
        }
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
    found = (
        re.search(r"\.layers\.(\d+)\.", name) for name in open_adapter(config_path.parent).names()
    )
    return 1 + max((int(match[1]) for match in found if match), default=0)


def check_same_adapter(saved: LoraConfig, current: LoraConfig, directory: Path) -> None:
    """Check that a saved adapter fits the model's adapters; dropout may differ.

    Raises:
        CheckpointError: naming every differing field.
    """
    record = read_record(directory / CONFIG_NAME, error=CheckpointError, remedy=_REMEDY)
    saved = same_but_stacked(saved, current, record.get("target_modules"))
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
        "rank_pattern": _gate_up_pattern(settings, settings.rank),
    }


def peft_config(
    settings: LoraConfig, architecture: Architecture, base_model: str
) -> dict[str, Any]:
    """The content of `adapter_config.json` for `PeftModel.from_pretrained`.

    Args:
        settings: of the adapter.
        architecture: of the model.
        base_model: where PEFT finds the base model: a directory or a name on the hub.
    """
    modules = [module.name for module in modules_of(settings, architecture)]
    settings = file_settings(settings, architecture)
    return {
        **_fields_that_must_match(settings),
        "target_modules": modules,
        # PEFT declares an int, but computes with any number.
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "alpha_pattern": _gate_up_pattern(settings, settings.alpha),
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
        is_off |= name in ("rank_pattern", "alpha_pattern") and _gate_up_rank(config) is not None
        if name not in _READ | _IGNORED and not is_off:
            remedy = "merge the adapter into its base model with PEFT"
            add(name, f"is {value!r}, which is not supported", remedy)
    return problems
