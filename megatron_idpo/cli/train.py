"""The verbs `train` and `score`, for a single run or for stepwise DPO.

The configuration is checked before torch and megatron-core are imported, which takes seconds.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.yaml_tree import read_tree
from megatron_idpo.errors import ConfigError

if TYPE_CHECKING:
    from megatron_idpo.train.callbacks import Callback

REQUIRED = ("model", "data", "optimizer", "training")
OPTIONAL = ("objective", "lora", "layout", "reference", "sdpo", "checkpoint", "export", "logging")

SCORE_REQUIRED = ("model", "data")
SCORE_OPTIONAL = ("objective", "lora", "layout", "training", "reference", "sdpo")
"""Without steps; `sdpo: null` is allowed."""


def main(path: Path, overrides: Sequence[str], callbacks: "Sequence[Callback]" = ()) -> int:
    """Train; returns the exit code.

    Args:
        path: of the configuration.
        overrides: `section.field=value`.
        callbacks: receive the events of the run; from the Python API.

    Raises:
        UserError: on every rank.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    _prepare_cuda(config)
    if config.sdpo is not None:
        from megatron_idpo.sdpo.run import train_in_steps

        return train_in_steps(config, callbacks)
    from megatron_idpo.train.loop import train

    return train(config, callbacks)


DETERMINISTIC_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""What `training.deterministic` needs; as Megatron-LM's `--deterministic-mode`."""


def _prepare_cuda(config: RunConfig) -> None:
    """Set what CUDA, NCCL and Transformer Engine read when they start; values already set are kept.

    Under tensor parallelism GPUs have to start kernels in the order of the calls: megatron-core
    overlaps its collectives with products, and a collective that was called first must start first.
    """
    if config.layout.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.training.deterministic:
        for name, value in DETERMINISTIC_VARIABLES.items():
            os.environ.setdefault(name, value)


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
