"""Progress of long tasks: a bar at a terminal, otherwise a line every few seconds.

    with show_progress("reference log-probs", len(pairs), unit="pairs", completed=cached) as task:
        for batch in batches:
            ...
            task.advance(len(batch))

At a terminal a bar stays at the bottom and disappears at the end. In a file, a pipe or the log of a
scheduler there are plain lines without control characters. Both end with one final line:
`reference log-probs: 38 pairs in 0:22`.

`ProgressDisplay` shows several tasks at once, and lines that pass above the bars.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_idpo.console.text import format_duration, format_number

_LINE_INTERVAL_S = 15.0
_REFRESHES_PER_S = 2
"""Redraws of the bar. Each takes time from the thread that works (it holds the GIL)."""


@dataclass
class ProgressTask:
    """One countable task of a display; created by `ProgressDisplay.add_task`."""

    display: "ProgressDisplay"
    description: str
    total: int
    unit: str
    completed: int
    """Units, including those of earlier runs, which do not count for the rate."""

    _first_update: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        """Add the bar."""
        self._earlier = self.completed
        self._start_s = self._last_line_s = self.display.clock()
        self._last_update = (self.completed, self._start_s)
        self._id = self.display.bars.add_task(
            self.description, total=self.total, completed=self.completed, text=self.describe()
        )

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task was added."""
        return self.display.clock() - self._start_s

    @property
    def rate(self) -> float | None:
        """Units per second; None before the second update.

        Measured from the first update on: until then a task loads, compiles and warms up.
        """
        if self._first_update is None:
            return None
        (first, first_s), (last, last_s) = self._first_update, self._last_update
        return (last - first) / (last_s - first_s) if last > first and last_s > first_s else None

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds to completion; None where the rate is not known yet."""
        return (self.total - self.completed) / self.rate if self.rate else None

    def advance(self, count: int = 1, *, status: str = "") -> None:
        """Count `count` more units as completed."""
        self.update(self.completed + count, status=status)

    def update(self, completed: int, *, status: str = "") -> None:
        """Set the completed units.

        Args:
            completed: including those of earlier runs.
            status: free text that is shown after the count: a loss, the number of failures.
        """
        now_s = self.display.clock()
        self.completed = completed
        self._last_update = (completed, now_s)
        self._first_update = self._first_update or self._last_update
        text = self.describe(status)
        self.display.bars.update(self._id, completed=completed, text=text)
        is_due = now_s - self._last_line_s >= self.display.line_interval_s
        if is_due and completed < self.total and not self.display.is_terminal:
            self._last_line_s = now_s
            self.display.print(f"{self.description}: {text}")

    def describe(self, status: str = "") -> str:
        """`12/40 pairs | loss 0.69 | 3.10 pairs/s | eta 0:09`; unknown parts are left out."""
        parts = [f"{self.completed:,}/{self.total:,} {self.unit}".rstrip()]
        if status:
            parts.append(status)
        if self.unit and self.rate:
            parts.append(f"{format_number(self.rate)} {self.unit}/s")
        if self.eta_s is not None:
            parts.append(f"eta {format_duration(self.eta_s)}")
        return " | ".join(parts)

    def summarize(self) -> str:
        """The final line; it names what an earlier run completed."""
        resumed = f" ({self._earlier:,} from an earlier run)" if self._earlier else ""
        unit = self.unit.removesuffix("s") if self.completed == 1 else self.unit
        count = f"{self.completed:,} {unit}".rstrip()
        return f"{self.description}: {count}{resumed} in {format_duration(self.elapsed_s)}"

    def remove(self) -> None:
        """Take the bar off the display."""
        self.display.bars.remove_task(self._id)


@dataclass(kw_only=True)
class ProgressDisplay:
    """Bars of any number of tasks; a context manager, within which they are drawn.

    Args:
        show: False writes nothing at all (ranks other than the first).
        console: defaults to standard output.
        clock: returns seconds; tests inject their own.
        line_interval_s: between lines where there is no terminal; infinity writes none.

    Attributes:
        is_terminal: whether bars are drawn; otherwise there are only lines.
    """

    show: bool = True
    console: Console = field(default_factory=lambda: Console(highlight=False))
    clock: Callable[[], float] = time.monotonic
    line_interval_s: float = _LINE_INTERVAL_S

    def __post_init__(self) -> None:
        """Draw nothing yet."""
        self.is_terminal = self.console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            expand=True,
            transient=True,
            refresh_per_second=_REFRESHES_PER_S,
            disable=not (self.show and self.is_terminal),
        )

    def __enter__(self) -> Self:
        """Draw the bars."""
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bars; printed lines stay."""
        self.bars.stop()

    def add_task(
        self, description: str, total: int, *, unit: str = "", completed: int = 0
    ) -> ProgressTask:
        """A task with a bar.

        Args:
            description: what is done: `evaluating`, `reference log-probs`.
            total: units of the whole task.
            unit: plural: `pairs`; empty for a bare count without a rate.
            completed: units that an earlier run completed.
        """
        return ProgressTask(self, description, total, unit, completed)

    def print(self, line: str, *, style: str = "") -> None:
        """Print a line above the bars."""
        if self.show:
            # No wrapping by rich: a log has no width, and a terminal wraps lines itself.
            self.console.print(Text(line, style=style), soft_wrap=True)


@contextmanager
def show_progress(
    description: str,
    total: int,
    *,
    unit: str = "",
    completed: int = 0,
    summary: bool = True,
    show: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressTask]:
    """Show the progress of one task within the block.

    Args:
        description, total, unit, completed: see `ProgressDisplay.add_task`.
        summary: print `ProgressTask.summarize` at the end, unless the block raises. Pass False
            where the caller prints a better final line.
        show, console, clock: see `ProgressDisplay`.
    """
    console = console or Console(highlight=False)
    with ProgressDisplay(show=show, console=console, clock=clock) as display:
        if completed:
            count = f"{completed:,} of {total:,} {unit}".rstrip()
            display.print(f"{description}: resuming after {count}")
        task = display.add_task(description, total, unit=unit, completed=completed)
        yield task
    if summary:
        display.print(task.summarize())


def track[Item](
    items: Iterable[Item],
    description: str,
    *,
    total: int,
    unit: str = "",
    summary: bool = False,
    show: bool = True,
    console: Console | None = None,
) -> Iterator[Item]:
    """Yield the items unchanged and count them; see `show_progress`."""
    with show_progress(
        description, total, unit=unit, summary=summary, show=show, console=console
    ) as task:
        for item in items:
            yield item
            task.advance()


@contextmanager
def show_spinner(description: str, *, show: bool = True) -> Iterator[None]:
    """Show a spinner on stderr, at a terminal only, during work that cannot be counted."""
    console = Console(stderr=True)
    if show and console.is_terminal:
        with console.status(description):
            yield
    else:
        yield
