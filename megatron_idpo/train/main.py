"""The verb `train`: from a configuration file to a trained model."""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config import load_config

REQUIRED = ("model", "data", "optimizer", "training")
OPTIONAL = ("objective", "lora", "layout", "reference", "checkpoint", "logging")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Train; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    from megatron_idpo.train.loop import train  # torch and megatron-core: after the checks

    return train(config)
