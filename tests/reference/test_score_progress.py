"""Progress of scoring: lines in a file, a bar at a terminal, nothing on other ranks."""

import io

import pytest
from rich.console import Console

from megatron_idpo.reference.score_progress import ScoreProgress


def shown(*, terminal: bool, show: bool = True, done: int = 0) -> str:
    """Everything that is written about 40 pairs, 10 each 10 seconds."""
    written, now = io.StringIO(), [0.0]
    console = Console(file=written, force_terminal=terminal, width=100, _environ={})
    with ScoreProgress(
        "training pairs", 40, done=done, show=show, console=console, clock=lambda: now[0]
    ) as progress:
        for pairs in range(done + 10, 50, 10):
            now[0] += 10.0
            progress.update(pairs)
    return written.getvalue()


def test_lines_of_a_file() -> None:
    assert shown(terminal=False).splitlines() == [
        "scoring training pairs: 20/40 pairs | 1.0 pairs/s | eta 0:20",
        "scored training pairs: 40 of 40 pairs, 40 of them now, in 0:40",
    ]


def test_pairs_of_an_earlier_start_are_not_its_pace() -> None:
    lines = shown(terminal=False, done=10).splitlines()
    assert lines[0] == "scoring training pairs: going on after 10 of 40"
    assert lines[1] == "scoring training pairs: 30/40 pairs | 1.0 pairs/s | eta 0:10"
    assert lines[-1] == "scored training pairs: 40 of 40 pairs, 30 of them now, in 0:30"


def test_a_terminal_has_a_bar() -> None:
    text = shown(terminal=True)
    assert "━" in text and "scored training pairs" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(terminal: bool) -> None:
    assert shown(terminal=terminal, show=False) == ""


def test_nothing_is_claimed_after_a_failure() -> None:
    written = io.StringIO()
    with (
        pytest.raises(ZeroDivisionError),
        ScoreProgress("pairs", 4, console=Console(file=written, _environ={})),
    ):
        raise ZeroDivisionError
    assert "scored" not in written.getvalue()
