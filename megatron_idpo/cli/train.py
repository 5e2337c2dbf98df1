"""The verb `train`: from a configuration file to a trained model, in one step or in several."""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.run_config import load_config

REQUIRED = ("model", "data", "optimizer", "training")
OPTIONAL = ("objective", "lora", "layout", "reference", "sdpo", "checkpoint", "logging")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Train; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    # torch and megatron-core: after the checks
    if config.sdpo is not None:
        from megatron_idpo.sdpo.run import train_in_steps

        return train_in_steps(config)
    from megatron_idpo.train.loop import train

    return train(config)
