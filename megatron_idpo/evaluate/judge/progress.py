"""How far judging is: a bar at a terminal, else a line every now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_S = 15.0


@contextmanager
def judging(
    what: str, total: int, console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[bool], None]]:
    """Show progress within the block.

    Args:
        what: is compared.
        total: questions to put.
        console: where to.
        clock: seconds.

    Yields:
        A function to call after each question, with whether it has a verdict.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    done = silent = 0
    said_s = clock()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(what, total=total, message="")

        def step(is_verdict: bool) -> None:
            nonlocal done, silent, said_s
            done, silent = done + 1, silent + (not is_verdict)
            message = f"{silent} without a verdict" if silent else ""
            bar.update(task, completed=done, message=message)
            if not console.is_terminal and clock() - said_s >= _LINE_S and done < total:
                said_s = clock()
                line = f"{what}: {done:,} of {total:,} questions{message and ', '}{message}"
                console.print(Text(line), soft_wrap=True)

        yield step
