"""Loggers of metrics: always the metrics file, and TensorBoard and W&B if configured.

Every rank knows the metrics; the first rank logs them. TensorBoard and W&B are optional extras.
"""

import importlib
import importlib.util
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_idpo.config.training import LoggingConfig, WandbConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.parallel.world import is_rank0
from megatron_idpo.train.callbacks import Callback
from megatron_idpo.train.metrics.file import MetricsFile
from megatron_idpo.train.metrics.names import dashboard_name

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"


class TensorBoardLogger(Callback):
    """Writes event files, which TensorBoard can show during the run."""

    def __init__(self, directory: Path, *, resumed_step: int | None) -> None:
        """Open an event file.

        Args:
            directory: of the event files, also of earlier starts of the run.
            resumed_step: step that the run resumes from; TensorBoard hides later ones. None is a
                new run, which hides all.
        """
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=purge_step)
        self.close = self._writer.close

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value as a scalar and flush the file."""
        for name, value in values.items():
            self._writer.add_scalar(dashboard_name(name), value, step)
        self._writer.flush()


class WandbLogger(Callback):
    """Logs to Weights & Biases; all starts of a run continue one W&B run.

    The W&B run id is stored next to the metrics. W&B does not accept a step twice, which a resumed
    run would log; the step is therefore a metric, and the x axis of all others.
    """

    def __init__(
        self,
        output: Path,
        settings: WandbConfig,
        *,
        resumed_step: int | None,
        run_config: Mapping[str, Any],
    ) -> None:
        """Start a W&B run, or continue the one whose id is in `output`.

        Args:
            output: the run's directory; W&B writes its files to `wandb` in it.
            settings: project, names and mode.
            resumed_step: step that the run resumes from; None starts a new W&B run.
            run_config: shown by W&B as the configuration.

        Raises:
            ConfigError: W&B cannot be used: no account, no connection.
        """
        wandb: Any = importlib.import_module("wandb")  # untyped, and optional
        output.mkdir(parents=True, exist_ok=True)
        id_file = output / WANDB_ID_FILE
        continues = resumed_step is not None and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if continues else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name,
                mode=settings.mode,
                id=run_id,
                # Offline, W&B cannot check whether the run exists.
                resume="allow" if continues and settings.mode == "online" else None,
                dir=str(output),
                config=dict(run_config),
                # The bar is redrawn twice a second: W&B must not record the console.
                settings={"console": "off"},
            )
        except Exception as error:  # classes of wandb, of requests and of its service
            message = f"cannot be reached: {str(error) or type(error).__name__}"
            remedy = "run `wandb login`, or set logging.wandb.mode to offline"
            raise ConfigError.at("logging.wandb", message, remedy) from error
        id_file.write_text(f"{run_id}\n", encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.close = self._run.finish

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values with their step."""
        named = {dashboard_name(name): value for name, value in values.items()}
        self._run.log({"step": step, **named})


def logger_problems(settings: LoggingConfig) -> list[Problem]:
    """Packages that the configured loggers need and that are not installed."""
    needed = {"tensorboard": settings.tensorboard, "wandb": settings.wandb is not None}
    return [
        Problem(
            f"logging.{package}",
            f"needs the package {package}, which is not installed",
            f"pip install {package}, or leave logging.{package} out",
        )
        for package, is_needed in needed.items()
        if is_needed and importlib.util.find_spec(package) is None
    ]


@contextmanager
def open_loggers(
    output: Path,
    settings: LoggingConfig,
    *,
    resumed_step: int | None,
    run_config: Mapping[str, Any],
) -> Iterator[list[Callback]]:
    """The loggers of a run, open within the block; on ranks other than the first there are none.

    Args:
        output: the run's directory.
        settings: which loggers, checked by `logger_problems`.
        resumed_step: step that the run resumes from; None is a new run with an empty metrics file.
        run_config: the resolved configuration, shown by W&B.

    Raises:
        ConfigError: `output` cannot be written to, or W&B cannot be used.
    """
    loggers: list[Callback] = []
    with ExitStack() as stack:
        if is_rank0():
            loggers.append(MetricsFile(output / METRICS_FILE, resumed_step=resumed_step))
            if settings.tensorboard:
                directory = output / TENSORBOARD_DIRECTORY
                tensorboard = TensorBoardLogger(directory, resumed_step=resumed_step)
                stack.callback(tensorboard.close)
                loggers.append(tensorboard)
            if settings.wandb is not None:
                wandb = WandbLogger(
                    output, settings.wandb, resumed_step=resumed_step, run_config=run_config
                )
                stack.callback(wandb.close)
                loggers.append(wandb)
        yield loggers
