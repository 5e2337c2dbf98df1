"""Progress of answering: lines in a file, a bar at a terminal, one line that stays."""

import io
from pathlib import Path

from rich.console import Console

from megatron_idpo.evaluate.generate.answers import Answer
from megatron_idpo.evaluate.generate.progress import GenerateProgress


def answers(count: int) -> list[Answer]:
    """Of 5 tokens each; every fourth is cut off."""
    return [Answer(at, f"p:{at}", "x", "y", 5, at % 4 != 3) for at in range(count)]


def shown(*, terminal: bool, done: int = 0) -> str:
    """Everything that is written about 8 answers, 2 each 10 seconds."""
    written, now = io.StringIO(), [0.0]
    console = Console(file=written, force_terminal=terminal, width=100, _environ={})
    with GenerateProgress("mine", 8, done=done, console=console, clock=lambda: now[0]) as progress:
        for first in range(done, 8, 2):
            now[0] += 10.0
            progress.update(answers(8)[first : first + 2])
        progress.finish(answers(8), Path("mine.jsonl"))
    return written.getvalue()


def test_lines_of_a_file() -> None:
    assert shown(terminal=False).splitlines() == [
        "mine: 4/8 answers, 1.0 tokens/s",
        "mine: 8 answers, 5.0 tokens each, 75% complete, 1.0 tokens/s: mine.jsonl",
    ]


def test_answers_of_an_earlier_start_are_not_its_pace() -> None:
    lines = shown(terminal=False, done=4).splitlines()
    assert lines[0] == "mine: going on after 4 of 8 answers"
    assert lines[-1] == "mine: 8 answers, 5.0 tokens each, 75% complete, 1.0 tokens/s: mine.jsonl"


def test_a_terminal_has_a_bar() -> None:
    text = shown(terminal=True)
    assert "━" in text and "75% complete" in text
