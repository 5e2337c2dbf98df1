"""The verb `score` for one reference: its cache, made ahead of training.

`cli_score.py` leads here where there are no steps; `sdpo=null` is read, to say so.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.run_config import load_config
from megatron_idpo.errors import ConfigError

REQUIRED = ("model", "data")
OPTIONAL = ("objective", "lora", "layout", "training", "reference", "sdpo")


def main(path: Path, overrides: Sequence[str]) -> int:
    """Score; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    if config.reference.source != "cache":
        message = f"is {config.reference.source}, which reads no cache"
        raise ConfigError.at("reference.source", message, "set it to cache, the default")
    from megatron_idpo.reference.score_command import (
        score,  # torch and megatron-core: after the checks
    )

    return score(config)
