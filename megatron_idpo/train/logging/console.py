"""What somebody who watches a run sees: a bar, and a line of figures every now and then.

At a terminal the bar stays at the bottom with the loss and the time that is left, and lines pass
above it. Without one (a file, a pipe, a scheduler's log) there are only the lines, without control
characters. One rank shows it; on the others everything here is silent.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_idpo.train.logging.line import clock_time, evaluation_line, training_line
from megatron_idpo.train.metrics.names import LOSS, MARGIN
from megatron_idpo.train.summary import show_summary

_REFRESHES_PER_S = 2
"""Of the bar; each takes a little time from the thread that trains."""


class RunConsole:
    """Shows a run; a context manager, within which the bar is there."""

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            total_steps: of the whole run.
            first_step: the step that the run goes on from.
            show: whether this rank speaks.
            console: where to; standard output if not given.
            clock: seconds.
        """
        self._total_steps = total_steps
        self._show = show
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._began_s = clock()
        self._marked: tuple[int, float] | None = None
        self._now: tuple[int, float] = (first_step, 0.0)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[told]}", style="bold"),
            TextColumn("{task.fields[eta]}", style="cyan"),
            console=self._console,
            expand=True,
            transient=True,
            refresh_per_second=_REFRESHES_PER_S,
            disable=not (show and self._console.is_terminal),
        )
        self._training = self._bar.add_task(
            "training",
            total=total_steps,
            completed=first_step,
            count=f"{first_step}/{total_steps}",
            message="",
            eta="",
        )

    def __enter__(self) -> Self:
        """The bar appears."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The bar is gone; the lines stay."""
        self._bar.stop()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step has ended: the bar moves on. To be called for each, logged or not.

        Args:
            step: its number, from 1.
            values: its metrics, named as in `metric_names`.
        """
        self._now = (step, self._clock())
        # The first step of a start takes longer than others: it is not counted.
        self._marked = self._marked or self._now
        eta_s = self._eta_s()
        message = [f"{word} {values[name]:{form}}" for word, name, form in _SHOWN if name in values]
        self._bar.update(
            self._training,
            completed=step,
            count=f"{step}/{self._total_steps}",
            message=" ".join(message),
            eta="" if eta_s is None else f"eta {clock_time(eta_s)}",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A line about a step."""
        line = training_line(
            step, self._total_steps, values, eta_s=self._eta_s(), width=self._width
        )
        self.say(line)

    def evaluated(self, step: int, values: Mapping[str, float], *, seconds: float) -> None:
        """A line about an evaluation after a step (0: before the first)."""
        line = evaluation_line(step, self._total_steps, values, seconds=seconds, width=self._width)
        self.say(line, style="bold")

    def say(self, line: str, *, style: str = "") -> None:
        """A line of its own: what was saved, where to look."""
        if self._show:
            # Never broken by rich: a log has no width, and a terminal breaks lines by itself.
            self._console.print(Text(line, style=style), soft_wrap=True)

    def summary(self, metrics_path: Path, achieved: Mapping[str, float]) -> None:
        """What the run came to: a table of the whole of it, and this start's pace.

        Args:
            metrics_path: the run's metrics file.
            achieved: averages of this start (`Meter.averages`), and the memory peak if known.

        Raises:
            ConfigError: the metrics cannot be read.
        """
        if self._show:
            wall_s = self._clock() - self._began_s
            show_summary(self._console, metrics_path, achieved, wall_s=wall_s)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A second bar, for what goes on between steps.

        Args:
            what: the word before it: `evaluating`.
            total: how often the function that this gives is going to be called.
        """
        task = self._bar.add_task(what, total=total, count=f"0/{total}", message="", eta="")
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._bar.update(task, completed=done, count=f"{done}/{total}")

        try:
            yield advance
        finally:
            self._bar.remove_task(task)

    @property
    def _width(self) -> int | None:
        """Columns of the terminal; a file has room for everything."""
        return self._console.width if self._console.is_terminal else None

    def _eta_s(self) -> float | None:
        """Time that is left, evaluations and checkpoints in proportion; None at the beginning."""
        if self._marked is None or self._now[0] == self._marked[0]:
            return None
        (first, began_s), (step, now_s) = self._marked, self._now
        return (now_s - began_s) / (step - first) * (self._total_steps - step)


_SHOWN = (("loss", LOSS, ".4f"), ("margin", MARGIN, "+.3f"))
"""What the bar shows besides its place: word, name, format."""
