"""What can be known to go wrong before a weight is read: the configuration against the model."""

from collections.abc import Mapping
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.train.logging.loggers import logger_problems


def check_against_model(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    """Refuse what this model and this world cannot do. Not collective.

    Raises:
        ConfigError: naming every mistake.
    """
    found = [
        *config.layout.layout().problems(architecture, world_size),
        *_layer_problems(config, architecture),
        *logger_problems(config.logging),
    ]
    if config.model.dtype == "fp16":
        message = "is fp16, which has not been tried in training"
        found.append(Problem("model.dtype", message, "use bf16, or fp32"))
    if found:
        raise ConfigError.of(found)


def check_same_training(
    saved: Mapping[str, Any], config: RunConfig, location: str
) -> list[Problem]:
    """Why a run with this configuration must not go on from a checkpoint; empty where it may.

    What is learnt has to stay: the objective, the adapters, whether there is a reference. Layout,
    learning rate, length and everything about saving and logging may change.

    Args:
        saved: the configuration that the checkpoint was written with, as plain values.
        config: of this run.
        place: the checkpoint's directory, to be named.
    """
    mine = config.model_dump(mode="json")
    found = []
    for section in ("objective", "lora"):
        before, now = saved.get(section) or {}, mine[section] or {}
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                message = f"was written with {section}.{name} = {before.get(name)}, not "
                remedy = "keep it as it was, or name another output directory"
                found.append(Problem(location, f"{message}{now.get(name)}", remedy))
    source, wanted = (saved.get("reference") or {}).get("source"), mine["reference"]["source"]
    if (source == "none") != (wanted == "none"):
        message = f"was written with reference.source = {source}, not {wanted}"
        remedy = "keep a reference or none, or name another output directory"
        found.append(Problem(location, message, remedy))
    return found


def _layer_problems(config: RunConfig, architecture: Architecture) -> list[Problem]:
    try:
        layers = resolve_layers(config.objective.layers, architecture.num_layers)
        config.objective.objective().layer_scales(len(layers))
    except ConfigError as error:
        return list(error.problems)
    return []
