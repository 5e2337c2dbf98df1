"""How far judging is, where there is no terminal and where there is one."""

from io import StringIO

from rich.console import Console

from megatron_idpo.evaluate.judge.progress import judging


def test_a_line_every_now_and_then() -> None:
    now_s = 0.0
    console = Console(file=StringIO(), width=40)
    with judging("[b]a against b", 50, console, clock=lambda: now_s) as step:
        for number in range(50):
            now_s += 1.0
            step(number != 20)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == [
        "[b]a against b: 15 of 50 questions",
        "[b]a against b: 30 of 50 questions, 1 without a verdict",
        "[b]a against b: 45 of 50 questions, 1 without a verdict",
    ]


def test_a_bar_at_a_terminal() -> None:
    console = Console(file=StringIO(), width=100, force_terminal=True)
    with judging("[b]a against b", 4, console) as step:
        step(True)
        step(False)
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "[b]a against b" in shown and "2/4" in shown and "1 without a verdict" in shown
