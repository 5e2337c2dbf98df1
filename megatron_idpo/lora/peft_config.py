"""PEFT's `adapter_config.json`: what of it we mean, and what we refuse.

Everything that would change the numbers and is not expressed in `LoraConfig` is refused by name,
so that no adapter is silently read as another one. What only concerns how an adapter was made, or
where it is from, is ignored.
"""

from pathlib import Path
from typing import Any

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.convert.hf_io.tokenizer_files import read_json_object
from megatron_idpo.errors import CheckpointError, ConfigError, Problem

CONFIG_NAME = "adapter_config.json"

_READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
_READ |= {"use_rslora", "init_lora_weights"}

_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",  # says how to read layers_to_transform
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # says how to read use_qalora
    "revision",
    "runtime_config",
}

_NEUTRAL_WORDS = {"bias": "none"}
"""Fields whose neutral value is a word; the others' is null, false or empty."""

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model's weights alone."""


def read_peft_settings(directory: Path) -> LoraConfig:
    """The settings of an adapter that PEFT saved; the seed is the default.

    Args:
        directory: with `adapter_config.json`.

    Raises:
        CheckpointError: not there, not LoRA, or with options that we do not have; all of them.
    """
    path = directory / CONFIG_NAME
    config = read_json_object(path)
    if problems := _unsupported(config, str(path)):
        raise CheckpointError.of(problems)
    try:
        return LoraConfig(
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=config["target_modules"],
            rslora=bool(config.get("use_rslora", False)),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError.at(str(path), f"does not describe an adapter: {error}") from None


def check_same_settings(found: LoraConfig, wanted: LoraConfig, path: Path) -> None:
    """An adapter on disk means the same as the one in the model; dropout may differ.

    Raises:
        CheckpointError: naming every field that does not.
    """
    fields = {
        "r": (found.rank, wanted.rank),
        "lora_alpha": (found.alpha, wanted.alpha),
        "use_rslora": (found.rslora, wanted.rslora),
        "target_modules": (list(found.projections), list(wanted.projections)),
    }
    problems = [
        Problem(f"{path}: {name}", f"is {there}, and {here} in this model", "make them equal")
        for name, (there, here) in fields.items()
        if there != here
    ]
    if problems:
        raise CheckpointError.of(problems)


def peft_config(settings: LoraConfig, base_model: str) -> dict[str, Any]:
    """The content of `adapter_config.json` for `PeftModel.from_pretrained`.

    Args:
        settings: of the adapter.
        base_model: where PEFT finds the base model, a directory, which is written absolute, or a
            name on the hub.
    """
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).absolute())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        # PEFT's own type is int; it computes with any number.
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": list(settings.projections),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _unsupported(config: dict[str, Any], path: str) -> list[Problem]:
    """Every field whose value means something that we do not do."""
    found = []
    for name, wanted in (("peft_type", ("LORA",)), ("task_type", (None, "CAUSAL_LM"))):
        if config.get(name) not in wanted:
            message = f"is {config.get(name)!r}, only {wanted[-1]} is supported"
            found.append(Problem(f"{path}: {name}", message))
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        message, remedy = f"is the pattern {targets!r}", "list the projections"
        found.append(Problem(f"{path}: target_modules", message, remedy))
    elif not isinstance(targets, str | list):
        remedy = "list the projections"
        found.append(Problem(f"{path}: target_modules", f"is {targets!r}", remedy))
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        message = (
            f"is {config['init_lora_weights']!r}, which changes the base model's weights as well"
        )
        remedy = "save it by PEFT as plain LoRA (path_initial_model_for_weight_conversion)"
        found.append(Problem(f"{path}: init_lora_weights", message, remedy))
    for name, value in sorted(config.items()):
        is_neutral = not value or value == _NEUTRAL_WORDS.get(name)
        if name not in _READ | _IGNORED and not is_neutral:
            message = f"is {value!r}, which is not supported"
            found.append(
                Problem(f"{path}: {name}", message, "merge the adapter into its base by PEFT")
            )
    return found
