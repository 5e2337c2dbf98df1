"""What a conversion shows: a bar over its tensors, what else takes time, and what was written.

On the rank that speaks. Bars and spinners go to stderr and only to a terminal; the line at the end
goes to stdout, always.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def tensor_progress[Item](
    what: str, items: Iterable[Item], *, total: int, show: bool
) -> Iterator[Item]:
    """The items, unchanged, while a bar counts them.

    Args:
        what: the words before the bar: `reading the weights`.
        items: what to go through.
        total: how many they are.
        show: False draws nothing (other ranks).
    """
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(items, total=total, description=what)


@contextmanager
def busy(what: str, *, show: bool) -> Iterator[None]:
    """A spinner while something goes on that cannot be counted."""
    console = Console(stderr=True)
    if show and console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


def weights_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """The size of a model's weights."""
    return sum(prod(shape) for shape in shapes.values()) * dtype.itemsize


def report_written(
    target: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seconds: float
) -> None:
    """One line about what is there now."""
    size = weights_bytes(shapes, dtype)
    message = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    print(
        f"wrote {target}: {len(shapes)} tensors, {message} of {str(dtype).removeprefix('torch.')}, "
        f"in {seconds:.1f} s",
        flush=True,
    )
