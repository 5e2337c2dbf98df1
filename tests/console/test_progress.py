"""Progress: lines in a file, a bar at a terminal, nothing on other ranks."""

import io
import re

import pytest
from rich.console import Console

from megatron_idpo.console.progress import ProgressDisplay, show_progress, track


class FakeClock:
    """Seconds that advance only when a test sets them."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Recorder:
    """A console that writes into a string."""

    def __init__(self, *, terminal: bool) -> None:
        self.clock = FakeClock()
        self._file = io.StringIO()
        self.console = Console(
            file=self._file, force_terminal=terminal, width=100, highlight=False, _environ={}
        )

    @property
    def text(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r", "\n")
        return [line.rstrip() for line in plain.splitlines() if line.strip()]


@pytest.fixture
def file() -> Recorder:
    return Recorder(terminal=False)


@pytest.fixture
def terminal() -> Recorder:
    return Recorder(terminal=True)


def run(recorder: Recorder, *, completed: int = 0, show: bool = True) -> None:
    """40 pairs in batches of 10: 30 s for the first batch, 5 s for each other one."""
    clock, console = recorder.clock, recorder.console
    with show_progress(
        "scoring [x]",
        40,
        unit="pairs",
        completed=completed,
        show=show,
        console=console,
        clock=clock,
    ) as task:
        while task.completed < task.total:
            clock.now_s += 30.0 if task.completed == completed else 5.0
            task.advance(10, status="1 failed")


def test_file_gets_a_line_per_interval_and_a_final_line(file):
    run(file)
    # 15 s between lines: after the batches at 30 s; the one at 45 s is the last.
    assert file.text.splitlines() == [
        "scoring [x]: 10/40 pairs | 1 failed",
        "scoring [x]: 40 pairs in 0:45",
    ]


def test_rate_and_eta_leave_out_the_first_update(file):
    with show_progress("scoring", 40, unit="pairs", console=file.console, clock=file.clock) as task:
        for seconds in (100.0, 20.0):
            file.clock.now_s += seconds
            task.advance(10)
        assert task.rate == pytest.approx(0.5)
        assert task.eta_s == pytest.approx(40.0)
    assert "scoring: 20/40 pairs | 0.50 pairs/s | eta 0:40" in file.lines


def test_resumed_task_reports_where_it_resumes(file):
    run(file, completed=20)
    assert file.lines[0] == "scoring [x]: resuming after 20 of 40 pairs"
    assert file.lines[-1] == "scoring [x]: 40 pairs (20 from an earlier run) in 0:35"


def test_terminal_gets_a_bar_and_the_final_line(terminal):
    run(terminal)
    assert re.fullmatch(
        r"scoring \[x\] ━+ 40/40 pairs \| 1 failed \| 2\.00 pairs/s \| eta 0:00", terminal.lines[-2]
    )
    assert terminal.lines[-1] == "scoring [x]: 40 pairs in 0:45"


def test_failed_task_has_no_final_line(file):
    with (
        pytest.raises(RuntimeError),
        show_progress("scoring", 2, console=file.console, clock=file.clock),
    ):
        raise RuntimeError
    assert file.text == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_hidden_progress_writes_nothing(terminal):
    recorder = Recorder(terminal=terminal)
    run(recorder, completed=10, show=False)
    assert recorder.text == ""


def test_display_shows_a_second_task_until_it_is_removed(terminal):
    with ProgressDisplay(console=terminal.console, clock=terminal.clock) as display:
        display.add_task("training", 10)
        task = display.add_task("evaluating", 3)
        task.advance()
        display.bars.refresh()
        assert re.search(r"evaluating .*1/3", terminal.text)
        task.remove()
        display.bars.refresh()
        assert "evaluating" not in terminal.text.rsplit("training", 1)[1]


def test_track_yields_the_items_unchanged(terminal):
    items = track(
        iter("abc"), "reading", total=3, unit="tensors", summary=True, console=terminal.console
    )
    assert list(items) == ["a", "b", "c"]
    assert terminal.lines[-1] == "reading: 3 tensors in 0:00"
