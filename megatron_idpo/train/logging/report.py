"""Reports of a run in progress: a progress bar and lines on the console, records in the loggers.

At a terminal a bar stays at the bottom, with lines above it. Without a terminal (a file, a pipe, a
scheduler's log) there are only the lines. The first rank prints; other ranks are silent.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.checkpoint.retention import CheckpointInfo
from megatron_idpo.console.progress import ProgressDisplay
from megatron_idpo.mcore.parallel.world import raise_on_all_ranks
from megatron_idpo.train.callbacks import Callback
from megatron_idpo.train.logging.line import evaluation_line, training_line
from megatron_idpo.train.logging.loggers import open_loggers
from megatron_idpo.train.metrics.flops import ModelFlops, lora_weights
from megatron_idpo.train.metrics.names import EPOCH, GRAD_NORM, LEARNING_RATE, LOSS, MARGIN, PEAK_GB
from megatron_idpo.train.metrics.peak_flops import current_device_peak
from megatron_idpo.train.metrics.reduce import StepMetrics
from megatron_idpo.train.metrics.throughput import Meter
from megatron_idpo.train.summary import show_summary
from megatron_idpo.train.trainer import Trainer


@dataclass
class Report:
    """Sends the events of a run to the console and to the callbacks, of which loggers are some.

    Metrics of steps are logged as means over all pairs since the previous record; gradient norm and
    learning rate are those of the last step.
    """

    display: ProgressDisplay
    loggers: Sequence[Callback]
    """Of this rank; only the first has some."""

    meter: Meter
    total_steps: int
    every_steps: int
    """Steps per record."""

    first_step: int = 0
    """Step that the run resumed from, or 0."""

    callbacks: Sequence[Callback] = ()
    """The caller's, on every rank."""

    on_all_ranks: Callable[[str], AbstractContextManager[None]] = raise_on_all_ranks
    """Encloses what may fail on one rank only."""

    _since_record: StepMetrics | None = None
    _peak_bytes: float = 0.0

    def __post_init__(self) -> None:
        """Add the bar."""
        self.print = self.display.print
        self._training = self.display.add_task(
            "training", self.total_steps, completed=self.first_step
        )

    def step(
        self,
        step: int,
        metrics: StepMetrics,
        *,
        grad_norm: float,
        lr: float,
        epoch: float,
        is_last: bool,
    ) -> None:
        """Advance the bar; print and log the first, every so many and the last step.

        Args:
            step: index, from 1.
            metrics: of the step.
            grad_norm: before clipping.
            lr: learning rate.
            epoch: after the step.
            is_last: whether the run ends with it, complete or stopped.
        """
        self.meter.end(metrics.work)
        self._peak_bytes = max(self._peak_bytes, metrics.peak_memory_bytes)
        previous = self._since_record
        self._since_record = metrics if previous is None else previous + metrics
        values = metrics.values()
        status = f"loss {values[LOSS]:.4f} margin {values[MARGIN]:+.3f}"
        self._training.update(step, status=status)
        # Without the collective that the other events have: it would be one more per step.
        for callback in self.callbacks:
            callback.on_step(step, values)
        is_first = step == self.first_step + 1
        if not (is_first or step % self.every_steps == 0 or is_last):
            return
        values = {
            EPOCH: epoch,
            **self._since_record.values(),
            GRAD_NORM: grad_norm,
            LEARNING_RATE: lr,
            PEAK_GB: self._peak_bytes / 1e9,
            **self.meter.take(),
        }
        self._since_record = None
        eta_s = self._training.eta_s
        self.print(training_line(step, self.total_steps, values, eta_s=eta_s, width=self._width))
        self._log(step, values)

    def evaluation(self, step: int, metrics: StepMetrics, *, seconds: float) -> dict[str, float]:
        """Print and log an evaluation after a step; returns its values as they are logged."""
        values = metrics.evaluation_values()
        line = evaluation_line(step, self.total_steps, values, seconds=seconds, width=self._width)
        self.print(line, style="bold")
        self._log(step, values)
        self._call("callbacks after an evaluation", lambda each: each.on_evaluation(step, values))
        return values

    def start(self, output: Path) -> None:
        """Before the first step of this start. Collective."""
        first, total = self.first_step, self.total_steps
        self._call(
            "callbacks at the start",
            lambda each: each.on_start(output, step=first, total_steps=total),
        )

    def checkpoint(self, info: CheckpointInfo | None) -> None:
        """A checkpoint that has been completed, if there is one. Collective."""
        if info is not None:
            self._call(
                "callbacks after a save", lambda each: each.on_checkpoint(info.step, info.directory)
            )

    def end(self, step: int, *, is_complete: bool) -> None:
        """After the last step of this start. Collective."""
        self._call("callbacks at the end", lambda each: each.on_end(step, is_complete=is_complete))

    @contextmanager
    def evaluating(self, num_batches: int) -> Iterator[Callable[[], None]]:
        """A second bar; yields the function that advances it by a batch."""
        task = self.display.add_task("evaluating", num_batches)
        try:
            yield task.advance
        finally:
            task.remove()

    def summary(self, metrics_path: Path) -> None:
        """Print a table of the whole run from its metrics file, and the speed since this start.

        Raises:
            ConfigError: the metrics cannot be read.
        """
        if self.display.show:
            averages = {**self.meter.averages(), PEAK_GB: self._peak_bytes / 1e9}
            wall_s = self._training.elapsed_s
            show_summary(self.display.console, metrics_path, averages, wall_s=wall_s)

    def _log(self, step: int, values: dict[str, float]) -> None:
        with self.on_all_ranks("writing the logs"):
            for callback in (*self.loggers, *self.callbacks):
                callback.on_log(step, values)

    def _call(self, what: str, event: Callable[[Callback], None]) -> None:
        if self.callbacks:
            with self.on_all_ranks(what):
                for callback in self.callbacks:
                    event(callback)

    @property
    def _width(self) -> int | None:
        """Columns of the terminal; None in a file, where lines have any length."""
        return self.display.console.width if self.display.is_terminal else None


@contextmanager
def open_report(trainer: Trainer, callbacks: Sequence[Callback]) -> Iterator[Report]:
    """A report of a run from its current step; its loggers are closed at the end. Collective.

    Args:
        trainer: of the run.
        callbacks: the caller's.

    Raises:
        ConfigError: on every rank; a logger cannot be opened.
    """
    with ExitStack() as stack:
        with raise_on_all_ranks("opening the loggers"):
            loggers = stack.enter_context(
                open_loggers(
                    trainer.output.root,
                    trainer.config.logging,
                    resumed_step=trainer.step or None,
                    run_config=trainer.config.model_dump(mode="json"),
                )
            )
        # Without a terminal, lines are printed per record and not every few seconds.
        display = ProgressDisplay(show=trainer.world.is_first, line_interval_s=math.inf)
        yield Report(
            stack.enter_context(display),
            loggers,
            _meter(trainer),
            total_steps=trainer.total_steps,
            every_steps=trainer.config.logging.every_steps,
            first_step=trainer.step,
            callbacks=callbacks,
        )


def _meter(trainer: Trainer) -> Meter:
    policy, config = trainer.policy, trainer.config
    architecture = policy.source.architecture
    adapter_weights = None
    if config.lora is not None:
        lora = config.lora.for_model(architecture)
        ranks = {name: lora.rank_of(name) for name in lora.names}
        adapter_weights = lora_weights(architecture, ranks)
    flops = ModelFlops(
        architecture=architecture,
        num_heads=len(policy.dpo.layers) + 1,
        adapter_weights=adapter_weights,
        reference_forwards=int(trainer.train_step.reference.needs_forward),
    )
    device_peak = current_device_peak(config.model.torch_dtype())
    return Meter(flops=flops, num_devices=trainer.world.size, device_peak=device_peak)
