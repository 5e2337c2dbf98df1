"""The table of all comparisons that `judge` ends with."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_idpo.evaluate.judge.tally import Tally

HEADS = ("model", "against", "won", "lost", "tied", "unjudged", "win rate", "95 %", "p")
_WORDS = 2
"""Columns that are not numbers."""

NOTHING = "–"


def result_table(names: Sequence[tuple[str, str]], tallies: Sequence[Tally]) -> Table:
    """A row for every comparison."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for at, head in enumerate(HEADS):
        is_word = at < _WORDS
        table.add_column(head, justify="left" if is_word else "right", no_wrap=not is_word)
    for (a, b), tally in zip(names, tallies, strict=True):
        rate, interval = tally.win_rate, tally.interval
        table.add_row(
            *map(
                Text,
                (
                    a,
                    b,
                    *map(str, (tally.wins, tally.losses, tally.ties, tally.unjudged)),
                    NOTHING if rate is None else f"{rate * 100:.1f} %",
                    NOTHING
                    if interval is None
                    else f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f}",
                    f"{tally.p_value:.3f}" if tally.p_value >= 0.001 else "< 0.001",
                ),
            )
        )
    return table
