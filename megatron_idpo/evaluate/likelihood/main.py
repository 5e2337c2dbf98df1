"""The verb `likelihood`: what its configuration has to say."""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig, load_config
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.models import evaluation_directory, subjects

REQUIRED = ("model", "data")
OPTIONAL = ("objective", "lora", "layout", "training", "evaluate")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Compute the curves; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    _check(config)
    from megatron_idpo.evaluate.likelihood.run import (
        likelihood,  # torch, megatron-core: after checks
    )

    return likelihood(config, subjects(config), evaluation_directory(config))


def _check(config: RunConfig) -> None:
    """Refuse a configuration without pairs that no model has learnt from."""
    if not config.data.holds_out:
        remedy = "name them in data.eval, or set data.eval_fraction as in training"
        raise ConfigError.at("data.eval", "there are no held-out pairs to read", remedy)
