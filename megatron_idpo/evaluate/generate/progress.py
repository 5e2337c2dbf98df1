"""How far answering is: a bar at a terminal, else a line every now and then; a line at the end."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_idpo.evaluate.counting import counted
from megatron_idpo.evaluate.generate.answers import Answer

_LINE_S = 15.0


class GenerateProgress:
    """A context manager for one model's answers, within which the bar is there."""

    def __init__(
        self,
        name: str,
        total: int,
        *,
        done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            name: the model's.
            total: prompts.
            done: answers of an earlier start.
            console: where to; standard output if not given.
            clock: seconds.
        """
        self._name = name
        self._total = total
        self._done = done
        self._tokens = 0
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._began_s = self._said_s = clock()
        self._bar = Progress(
            TextColumn(name),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}"),
            console=self._console,
            expand=True,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, message=self._describe())

    def __enter__(self) -> Self:
        """The bar appears."""
        self._bar.start()
        if self._done:
            self._say(f"{self._name}: going on after {self._done:,} of {self._total:,} answers")
        return self

    def update(self, answers: Sequence[Answer]) -> None:
        """A batch has been answered and saved."""
        self._done += len(answers)
        self._tokens += sum(answer.answer_tokens for answer in answers)
        message = self._describe()
        self._bar.update(self._task, completed=self._done, message=message)
        now_s = self._clock()
        is_due = now_s - self._said_s >= _LINE_S and self._done < self._total
        if not self._console.is_terminal and is_due:
            self._said_s = now_s
            self._say(f"{self._name}: {message}")

    def finish(self, answers: Sequence[Answer], path: Path) -> None:
        """The line that stays: all answers of the file, and the pace of those made now."""
        self._bar.stop()
        self._say(f"{summary(self._name, answers)}{self._pace()}: {path}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The bar is gone."""
        self._bar.stop()

    def _describe(self) -> str:
        return f"{self._done:,}/{self._total:,} answers{self._pace()}"

    def _pace(self) -> str:
        taken_s = self._clock() - self._began_s
        if not self._tokens or taken_s <= 0:
            return ""
        return f", {self._tokens / taken_s:,.1f} tokens/s"

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def summary(name: str, answers: Sequence[Answer]) -> str:
    """How many answers a model gave, how long they are, and how many it ended by itself."""
    mean_tokens = sum(answer.answer_tokens for answer in answers) / len(answers)
    complete = sum(answer.is_complete for answer in answers) / len(answers)
    message = counted(len(answers), "answer")
    return f"{name}: {message}, {mean_tokens:,.1f} tokens each, {complete:.0%} complete"
