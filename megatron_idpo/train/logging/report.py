"""What is told of a run while it goes on: to the person who watches, and into the logs."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from megatron_idpo.lora.settings import resolve_targets
from megatron_idpo.mcore.parallel.world import raise_on_all_ranks
from megatron_idpo.train.logging.console import RunConsole
from megatron_idpo.train.logging.loggers import Loggers, open_loggers
from megatron_idpo.train.metrics.flops import BatchWork, ModelFlops, lora_weights
from megatron_idpo.train.metrics.names import EPOCH, GRAD_NORM, LEARNING_RATE, PEAK_GB
from megatron_idpo.train.metrics.peak_flops import this_devices_peak
from megatron_idpo.train.metrics.reduce import StepMetrics
from megatron_idpo.train.metrics.throughput import Meter
from megatron_idpo.train.trainer import Run

MEMORY = "memory_bytes"
"""The name under which ranks' memory peaks travel with a step's metrics."""


class Report:
    """Steps and evaluations, to the console and to the loggers.

    What is logged of steps is their mean since the line before, over all pairs; norm and learning
    rate are the last step's.
    """

    def __init__(
        self,
        console: RunConsole,
        loggers: Loggers,
        meter: Meter,
        *,
        every_steps: int,
        first_step: int,
        agree: Callable[[str], AbstractContextManager[None]] = raise_on_all_ranks,
    ) -> None:
        """Put the parts together; `reporting` makes them. `agree` is around what may fail."""
        self.console = console
        self.meter = meter
        self._loggers = loggers
        self._every_steps = every_steps
        self._first_step = first_step
        self._agree = agree
        self._since: StepMetrics | None = None
        self._peak_bytes = 0.0

    def step(
        self,
        step: int,
        metrics: StepMetrics,
        *,
        grad_norm: float,
        lr: float,
        epoch: float,
        ends: bool,
    ) -> None:
        """A step has ended; with `ends`, the run too, for now or for good."""
        self.meter.end(BatchWork.from_extra(metrics.extra))
        self._peak_bytes = max(self._peak_bytes, metrics.peaks[MEMORY])
        self._since = metrics if self._since is None else self._since + metrics
        self.console.step(step, {**metrics.values(), LEARNING_RATE: lr})
        is_first = step == self._first_step + 1
        if not (is_first or step % self._every_steps == 0 or ends):
            return
        values = {
            EPOCH: epoch,
            **self._since.values(),
            GRAD_NORM: grad_norm,
            LEARNING_RATE: lr,
            PEAK_GB: self._peak_bytes / 1e9,
            **self.meter.take(),
        }
        self._since = None
        self.console.log(step, values)
        with self._agree("writing the logs"):
            self._loggers.log(step, values)

    def summary(self, metrics: Path) -> None:
        """A table of the whole run: its course from the metrics file, its speed since its start."""
        self.console.summary(metrics, {**self.meter.averages(), PEAK_GB: self._peak_bytes / 1e9})

    def evaluation(self, step: int, metrics: StepMetrics, *, seconds: float) -> dict[str, float]:
        """Held-out pairs have been read; returns their values under the names of logs."""
        values = metrics.evaluation_values()
        self.console.evaluated(step, values, seconds=seconds)
        with self._agree("writing the logs"):
            self._loggers.log(step, values)
        return values


@contextmanager
def reporting(run: Run) -> Iterator[Report]:
    """A report on a run from where it stands, whose loggers are closed at the end.

    Raises:
        ConfigError: a logger cannot be opened.
    """
    settings = run.config.logging
    with raise_on_all_ranks("opening the loggers"):
        loggers = open_loggers(
            run.output.root,
            settings,
            resumed_step=run.step or None,
            run_config=run.config.model_dump(mode="json"),
        )
    try:
        with RunConsole(run.total_steps, first_step=run.step, show=run.world.is_first) as console:
            yield Report(
                console,
                loggers,
                _meter(run),
                every_steps=settings.every_steps,
                first_step=run.step,
            )
    finally:
        loggers.close()


def _meter(run: Run) -> Meter:
    policy, config = run.trainer.policy, run.config
    architecture = policy.source.architecture
    adapter_weights = None
    if config.lora is not None:
        targets = resolve_targets(config.lora.targets)
        adapter_weights = lora_weights(architecture, config.lora.rank, targets)
    flops = ModelFlops(
        architecture=architecture,
        num_heads=len(policy.dpo.layers) + 1,
        adapter_weights=adapter_weights,
        reference_forwards=int(run.trainer.reference.is_live),
    )
    peak = this_devices_peak(config.model.torch_dtype())
    return Meter(flops, num_devices=run.world.size, device_peak=peak)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        """Begin."""
        self._began_s = time.perf_counter()

    def read(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._began_s
