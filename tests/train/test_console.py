"""The console: lines in a file, a bar and lines at a terminal, nothing on other ranks."""

import io
import re

import pytest
from rich.console import Console

from megatron_idpo.train.logging.console import RunConsole

VALUES = {
    "loss": 0.6213,
    "final_loss": 0.62,
    "layer_22/loss": 0.64,
    "rewards/margins": 0.21,
    "rewards/accuracies": 0.71,
    "grad_norm": 1.32,
    "learning_rate": 5e-5,
    "throughput/tokens_per_s": 3123.0,
    "throughput/pairs_per_s": 12.3,
}
EVALUATED = {"eval_loss": 0.58, "eval_rewards/margins": 0.3, "eval_pairs": 40.0}


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(*, terminal: bool, width: int = 140, show: bool = True, first_step: int = 0) -> str:
    """Everything that a short run writes."""
    written = io.StringIO()
    console = Console(
        file=written, force_terminal=terminal, width=width, highlight=False, _environ={}
    )
    clock = Clock()
    run = RunConsole(200, first_step=first_step, show=show, console=console, clock=clock)
    with run:
        run.evaluated(first_step, EVALUATED, seconds=1.0)
        for step in range(first_step + 1, first_step + 5):
            clock.now += 60.0 if step == first_step + 1 else 2.0
            run.step(step, VALUES)
            run.log(step, VALUES)
        with run.counting("evaluating", 3) as advance:
            for _ in range(3):
                advance()
        run.say("saved [red]here[/red] " + "x" * 200)
    return written.getvalue()


def test_a_file_gets_whole_lines_without_control_characters():
    text = shown(terminal=False, width=80)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "eval   0/200 | loss 0.5800 | margin +0.300 | 40 pairs in 1.0 s"
    assert lines[1] == (
        "step   1/200 | loss 0.6213 (L22 0.64, final 0.62) | margin +0.210 acc 0.71 | "
        "grad 1.32 lr 5.0e-05 | 3.1k tok/s 12.3 pairs/s"
    )
    # The first step is no measure of the others: 196 more at 2 seconds each.
    assert lines[4] == lines[1].replace("step   1", "step   4") + " | eta 6:32"
    assert lines[5] == "saved [red]here[/red] " + "x" * 200
    assert len(lines) == 6


def test_time_left_counts_from_where_the_run_was_resumed():
    assert shown(terminal=False, first_step=100).splitlines()[-2].endswith(" | eta 3:12")


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_gets_a_bar_and_lines_that_fit(width):
    text = shown(terminal=True, width=width)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    lines = plain.splitlines()
    assert max(len(line) for line in lines if "saved" not in line) <= width
    bars = [line for line in lines if line.startswith("training")]
    assert bars[0].rstrip().endswith("0/200")
    assert re.search(r"4/200 loss 0\.6213 margin \+0\.210 eta 6:32\s*$", bars[-1])
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 4 and steps[-1].endswith("eta 6:32")
    assert ("L22" in steps[0]) == (width == 140)


def test_other_ranks_are_silent():
    assert shown(terminal=False, show=False) == ""
    assert shown(terminal=True, show=False) == ""


@pytest.mark.parametrize("show", [True, False])
def test_the_summary_is_timed_from_the_beginning(tmp_path, show):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    written, clock = io.StringIO(), Clock()
    clock.now = 1000.0
    console = Console(file=written, width=80, _environ={})
    run = RunConsole(10, show=show, console=console, clock=clock)
    clock.now += 192.0
    run.summary(tmp_path / "metrics.jsonl", {"throughput/pairs_per_s": 2.0})
    assert ("0.5000" in written.getvalue()) == show
    assert written.getvalue().endswith("in 3:12; 2.00 pairs/s\n" if show else "")


def test_a_second_bar_counts_what_goes_on_between_steps():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, _environ={})
    with RunConsole(10, console=console) as run:
        with run.counting("evaluating", 3) as advance:
            advance()
            run._bar.refresh()
            assert re.search(r"evaluating .*1/3", written.getvalue())
        run._bar.refresh()
        last = written.getvalue().rsplit("training", 1)[1]
    assert "evaluating" not in last
