"""A progress bar over a conversion's tensors, on the rank that speaks and only at a terminal."""

from collections.abc import Iterable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def tensor_progress[Item](what: str, items: Iterable[Item], *, show: bool) -> Iterator[Item]:
    """The items, unchanged, while a bar counts them.

    Args:
        what: the words before the bar: `loading`.
        items: what to go through.
        show: False draws nothing (other ranks). Where the output is not a terminal, rich prints the
            finished bar once.
    """
    if not show:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        yield from progress.track(items, description=what)
