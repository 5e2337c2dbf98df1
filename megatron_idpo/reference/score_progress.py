"""How far scoring is: a bar at a terminal, else a line every now and then."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

_LINE_S = 15.0


class ScoreProgress:
    """A context manager, within which the bar is there; silent where it is not to speak."""

    def __init__(
        self,
        what: str,
        total_pairs: int,
        *,
        done: int = 0,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            what: the pairs' name.
            total_pairs: how many they are.
            done: how many an earlier start has scored.
            show: whether this rank speaks.
            console: where to; standard output if not given.
            clock: seconds.
        """
        self._what = what
        self._total = total_pairs
        self._first = self._done = done
        self._show = show
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._began_s = self._said_s = clock()
        self._bar = Progress(
            TextColumn(f"scoring {what}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}"),
            console=self._console,
            expand=True,
            transient=True,
            disable=not (show and self._console.is_terminal),
        )
        self._task = self._bar.add_task(what, total=total_pairs, completed=done, message="")

    def __enter__(self) -> Self:
        """The bar appears."""
        self._bar.start()
        if self._first:
            self._say(f"scoring {self._what}: going on after {self._first:,} of {self._total:,}")
        return self

    def update(self, done: int) -> None:
        """So many pairs are done, those of earlier starts included."""
        self._done = done
        message = self._describe()
        self._bar.update(self._task, completed=done, message=message)
        now_s = self._clock()
        if not self._console.is_terminal and now_s - self._said_s >= _LINE_S and done < self._total:
            self._said_s = now_s
            self._say(f"scoring {self._what}: {message}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The bar is gone; a line stays."""
        self._bar.stop()
        if kind is None:
            taken_s = self._clock() - self._began_s
            self._say(
                f"scored {self._what}: {self._done:,} of {self._total:,} pairs, "
                f"{self._done - self._first:,} of them now, in {_clock_time(taken_s)}"
            )

    def _describe(self) -> str:
        """Pairs done, pace and the time that is left."""
        taken_s = self._clock() - self._began_s
        message = f"{self._done:,}/{self._total:,} pairs"
        if taken_s <= 0 or self._done == self._first:
            return message
        pace = (self._done - self._first) / taken_s
        left_s = (self._total - self._done) / pace
        return f"{message} | {pace:,.1f} pairs/s | eta {_clock_time(left_s)}"

    def _say(self, line: str) -> None:
        if self._show:
            self._console.print(Text(line), soft_wrap=True)


def _clock_time(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
