"""Reports of a run: what is logged of its steps, and what the console shows."""

import io
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from rich.console import Console

from megatron_idpo.console.progress import ProgressDisplay
from megatron_idpo.train.callbacks import Callback
from megatron_idpo.train.logging.report import Report
from megatron_idpo.train.metrics.flops import BatchWork
from megatron_idpo.train.metrics.reduce import StepMetrics

from .run_hooks import Spoil
from .tiny_run import run, write_config


def on_this_rank(_: str) -> AbstractContextManager[None]:
    """Replaces the exchange of errors between ranks."""
    return nullcontext()


class FakeMeter:
    """Records the work of each step."""

    def __init__(self) -> None:
        self.works: list[BatchWork] = []

    def end(self, work: BatchWork) -> None:
        self.works.append(work)

    def take(self) -> dict[str, float]:
        return {"throughput/pairs_per_s": float(len(self.works))}

    averages = take


class FakeLogger(Callback):
    """Records what is logged."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def on_log(self, step: int, values: Any) -> None:
        self.records.append((step, dict(values)))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.records]

    def values(self, name: str) -> list[float]:
        return [values[name] for _, values in self.records]


class Case:
    """A report with fake parts and a fake clock."""

    def __init__(
        self, *, terminal: bool = False, width: int = 140, show: bool = True, **settings: int
    ) -> None:
        self.now_s = 0.0
        self.logger, self.meter, self._file = FakeLogger(), FakeMeter(), io.StringIO()
        console = Console(
            file=self._file, force_terminal=terminal, width=width, highlight=False, _environ={}
        )
        self.display = ProgressDisplay(
            show=show, console=console, clock=lambda: self.now_s, line_interval_s=float("inf")
        )
        arguments = {"total_steps": 200, "every_steps": 3, "first_step": 0, **settings}
        self.next_step = arguments["first_step"] + 1
        self.report = Report(
            self.display,
            [self.logger],
            self.meter,  # type: ignore[arg-type]
            on_all_ranks=on_this_rank,
            **arguments,  # type: ignore[arg-type]
        )

    def take_steps(self, *losses: float, is_last: bool = False, peak_bytes: float = 1e9) -> None:
        """Report steps with these losses; with `is_last` the run ends after the last of them."""
        for index, loss in enumerate(losses, 1):
            self.report.step(
                self.next_step,
                metrics(loss, peak_bytes=peak_bytes),
                grad_norm=10.0 * self.next_step,
                lr=0.1 * self.next_step,
                epoch=self.next_step,
                is_last=is_last and index == len(losses),
            )
            self.next_step += 1

    @property
    def text(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r", "\n")
        return [line.rstrip() for line in plain.splitlines() if line.strip()]


def metrics(loss: float, *, pairs: int = 2, peak_bytes: float = 1e9) -> StepMetrics:
    """Of one layer; `loss` is the mean over the pairs."""
    return StepMetrics(
        pairs=pairs,
        sums={4: {"loss": loss * pairs, "rewards/margins": 3.0 * pairs}},
        scales={4: 1.0},
        work=BatchWork(pairs=pairs),
        peak_memory_bytes=peak_bytes,
    )


# ---- what is logged -----------------------------------------------------------------------------


def test_record_is_the_mean_since_the_previous_record():
    case = Case()
    case.take_steps(1.0, 2.0, 4.0, 1.0, 1.0, 4.0, 7.0, 8.0, is_last=True)
    assert case.logger.steps == [1, 3, 6, 8]
    assert case.logger.values("loss") == [1.0, 3.0, 2.0, 7.5]
    _, last = case.logger.records[-1]
    assert (last["grad_norm"], last["learning_rate"], last["epoch"]) == (80.0, 0.8, 8)
    assert last["rewards/margins"] == 3.0 and last["throughput/pairs_per_s"] == 8
    assert [work.pairs for work in case.meter.works] == [2.0] * 8


def test_first_step_after_resuming_is_logged():
    case = Case(first_step=3)
    case.take_steps(1.0, 2.0, 3.0)
    assert case.logger.steps == [4, 6]


@pytest.mark.parametrize(("is_last", "steps"), [(True, [1, 3, 5]), (False, [1, 3])])
def test_last_step_is_logged(is_last, steps):
    case = Case()
    case.take_steps(1.0, 2.0, 3.0, 5.0, 7.0, is_last=is_last)
    assert case.logger.steps == steps
    assert case.logger.values("loss")[-1] == (6.0 if is_last else 2.5)


def test_peak_memory_is_the_highest_so_far():
    case = Case(every_steps=1)
    for peak_bytes in (2e9, 5e9, 1e9):
        case.take_steps(1.0, peak_bytes=peak_bytes)
    assert case.logger.values("memory/peak_gb") == [2.0, 5.0, 5.0]


def test_evaluation_is_logged_under_its_names():
    case = Case()
    values = case.report.evaluation(2, metrics(0.5, pairs=4), seconds=1.5)
    assert values["eval_loss"] == 0.5 and values["eval_pairs"] == 4.0
    assert case.logger.records == [(2, values)]


@pytest.mark.distributed
def test_records_before_an_error_are_written(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", logging={"every_steps": 1, "tensorboard": True})
    spoil = Spoil("layers.1.mlp.linear_fc2.weight", float("nan"), before_step=3)
    with pytest.raises(RuntimeError):
        workers.run(run, 1, file, spoil)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [tag for tag in events.Tags()["scalars"] if tag.endswith("loss")]
    assert len(events.Scalars(losses[0])) == 2


# ---- what the console shows ---------------------------------------------------------------------


def short_run(case: Case) -> None:
    """An evaluation, then four steps: 60 s for the first, 2 s for each other."""
    with case.display:
        case.report.evaluation(case.next_step - 1, metrics(0.58, pairs=40), seconds=1.0)
        for seconds in (60.0, 2.0, 2.0, 2.0):
            case.now_s += seconds
            case.take_steps(0.6213)
        case.report.print("saved [red]here[/red] " + "x" * 200)


def test_file_gets_whole_lines_without_control_characters():
    case = Case(every_steps=1, width=80)
    short_run(case)
    assert "\x1b" not in case.text and "\r" not in case.text
    assert case.lines[0] == "eval   0/200 | loss 0.5800 | margin +3.000 | 40 pairs in 1.0 s"
    assert case.lines[1].startswith("step   1/200 | loss 0.6213 | margin +3.000 | grad 10.00")
    # The first step is slower than the others: 196 more at 2 seconds each.
    assert case.lines[4].startswith("step   4/200") and case.lines[4].endswith(" | eta 6:32")
    assert case.lines[5] == "saved [red]here[/red] " + "x" * 200
    assert len(case.lines) == 6


def test_eta_counts_from_the_step_that_the_run_resumed_from():
    case = Case(every_steps=1, first_step=100)
    short_run(case)
    assert case.lines[-2].endswith(" | eta 3:12")


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_gets_a_bar_and_lines_that_fit(width):
    case = Case(terminal=True, every_steps=1, width=width)
    short_run(case)
    assert max(len(line) for line in case.lines if "saved" not in line) <= width
    bars = [line for line in case.lines if line.startswith("training")]
    assert bars[0].endswith("0/200")
    assert bars[-1].endswith("4/200 | loss 0.6213 margin +3.000 | eta 6:32")
    steps = [line for line in case.lines if line.startswith("step")]
    assert len(steps) == 4 and steps[-1].endswith("eta 6:32")
    assert ("pairs/s" in steps[-1]) == (width == 140)


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(tmp_path, terminal):
    case = Case(terminal=terminal, show=False, every_steps=1)
    short_run(case)
    case.report.summary(tmp_path / "no metrics file")
    assert case.text == ""


def test_summary_is_timed_from_the_start(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    case = Case()
    case.now_s += 192.0
    case.report.summary(tmp_path / "metrics.jsonl")
    assert "0.5000" in case.text
    assert case.lines[-1].startswith("in 3:12; 0.00 pairs/s")


def test_second_bar_is_shown_during_an_evaluation():
    case = Case(terminal=True)
    with case.display:
        with case.report.evaluating(3) as advance:
            advance()
            case.display.bars.refresh()
            assert re.search(r"evaluating .*1/3", case.text)
        case.display.bars.refresh()
        assert "evaluating" not in case.text.rsplit("training", 1)[1]
