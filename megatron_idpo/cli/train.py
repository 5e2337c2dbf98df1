"""The verbs `train` and `score`, for a single run or for stepwise DPO.

The configuration is checked before torch and megatron-core are imported, which takes seconds.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.yaml_tree import read_tree
from megatron_idpo.errors import ConfigError

REQUIRED = ("model", "data", "optimizer", "training")
OPTIONAL = ("objective", "lora", "layout", "reference", "sdpo", "checkpoint", "export", "logging")

SCORE_REQUIRED = ("model", "data")
SCORE_OPTIONAL = ("objective", "lora", "layout", "training", "reference", "sdpo")
"""Without steps; `sdpo: null` is allowed."""


def main(path: Path, overrides: Sequence[str]) -> int:
    """Train; returns the exit code.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    _order_kernels(config)
    if config.sdpo is not None:
        from megatron_idpo.sdpo.run import train_in_steps

        return train_in_steps(config)
    from megatron_idpo.train.loop import train

    return train(config)


def _order_kernels(config: RunConfig) -> None:
    """Let GPUs start kernels in the order of the calls, where tensor parallelism relies on it.

    megatron-core overlaps its collectives with products: a collective that was called first has to
    start first. CUDA reads the variable when it starts; a value that is set already is kept.
    """
    if config.layout.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def score(path: Path, overrides: Sequence[str]) -> int:
    """Compute the reference log-probabilities ahead of training; returns the exit code.

    With the section `sdpo` it needs the sections that `train` needs, because steps change them.

    Raises:
        UserError: on every rank.
    """
    if read_tree(path, overrides).values.get("sdpo") is None:
        config = load_config(path, overrides, required=SCORE_REQUIRED, optional=SCORE_OPTIONAL)
        if config.reference.source != "cache":
            message = f"is {config.reference.source}, which reads no cache"
            raise ConfigError.at("reference.source", message, "set it to cache, the default")
        from megatron_idpo.reference.score_command import score as score_reference

        return score_reference(config)
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    from megatron_idpo.sdpo.curriculum import score_for_steps

    return score_for_steps(config)
