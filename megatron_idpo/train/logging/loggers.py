"""Where metrics go: the metrics file always, TensorBoard and W&B if asked for.

Metrics are known on every rank (`metrics.py`); the first one logs them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_idpo.config.training import LoggingConfig
from megatron_idpo.errors import Problem
from megatron_idpo.mcore.parallel.world import is_first_rank
from megatron_idpo.train.logging.tensorboard import TensorBoardLogger, tensorboard_problems
from megatron_idpo.train.logging.wandb import WandbLogger, wandb_problems
from megatron_idpo.train.metrics.file import MetricsFile

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


class Logger(Protocol):
    """Something that keeps what is measured."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of a step, named as in `metric_names`."""

    def close(self) -> None:
        """Keep everything for good."""


class Loggers:
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        """All of them in this order; none keeps nothing."""
        self._loggers = list(loggers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values to each."""
        for logger in self._loggers:
            logger.log(step, values)

    def close(self) -> None:
        """Close each, the first opened last."""
        for logger in reversed(self._loggers):
            logger.close()


def logger_problems(settings: LoggingConfig) -> list[Problem]:
    """What is not installed for what is asked for; to be asked before anything is loaded."""
    return [
        *(tensorboard_problems() if settings.tensorboard else ()),
        *(wandb_problems() if settings.wandb is not None else ()),
    ]


def open_loggers(
    output: Path,
    settings: LoggingConfig,
    *,
    resumed_step: int | None,
    run_config: Mapping[str, Any],
) -> Loggers:
    """The loggers of a run on its first rank; on the others one that keeps nothing.

    Args:
        output: the run's directory.
        settings: which ones; `logger_problems` found nothing wrong with them.
        resumed_step: the last step of the checkpoint that the run goes on from; None is a new run,
            whose metrics file begins empty.
        run_config: the resolved configuration, for W&B to show.

    Raises:
        ConfigError: `output` cannot be written to, or W&B refuses.
    """
    if not is_first_rank():
        return Loggers([])
    opened: list[Logger] = [MetricsFile(output / METRICS_FILE, resumed_step=resumed_step)]
    try:
        if settings.tensorboard:
            directory = output / TENSORBOARD_DIRECTORY
            opened.append(TensorBoardLogger(directory, resumed_step=resumed_step))
        if settings.wandb is not None:
            opened.append(
                WandbLogger(
                    output, settings.wandb, resumed_step=resumed_step, run_config=run_config
                )
            )
    except Exception:
        Loggers(opened).close()
        raise
    return Loggers(opened)
