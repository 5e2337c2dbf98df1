"""What is told of steps: means since the line before, at the first, every so many and the last."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest

from megatron_idpo.mcore.parallel.groups import RankCoordinates
from megatron_idpo.train.logging.report import MEMORY, Report, Stopwatch
from megatron_idpo.train.metrics.flops import BatchWork
from megatron_idpo.train.metrics.reduce import StepMetrics

from .run_hooks import Spoil
from .tiny_run import run, write_config


def alone(_: str) -> AbstractContextManager[None]:
    """Agreement with oneself."""
    return nullcontext()


class Fake:
    """Console, loggers and meter in one: remembers what it is called with."""

    def __init__(self) -> None:
        self.bar: list[tuple[int, float]] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[tuple[int, float, float]] = []
        self.works: list[BatchWork] = []

    def step(self, step: int, values: dict[str, float]) -> None:
        self.bar.append((step, values["loss"]))

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, values))

    def evaluated(self, step: int, values: dict[str, float], *, seconds: float) -> None:
        self.evaluations.append((step, values["eval_loss"], seconds))

    def end(self, work: BatchWork) -> None:
        self.works.append(work)

    def take(self) -> dict[str, float]:
        return {"taken": float(len(self.works))}


def metrics(loss: float, *, pairs: int = 2, memory: float = 1e9) -> StepMetrics:
    """Of one layer and a batch of so many pairs; `loss` is the mean."""
    with patch(
        "megatron_idpo.train.metrics.flops.this_rank", return_value=RankCoordinates(0, 1, 0, 0)
    ):
        extra = BatchWork(pairs=pairs).as_extra()
    sums = {"loss": loss * pairs, "rewards/margins": 3.0 * pairs}
    return StepMetrics(
        pairs=pairs, sums={4: sums}, scales={4: 1.0}, extra=extra, peaks={MEMORY: memory}
    )


def message(losses: list[float], *, ends: bool = True, **settings: int) -> Fake:
    """Console and logs of steps with these losses; whether the run ends after the last of them."""
    fake = Fake()
    arguments = {"every_steps": 3, "first_step": 0, **settings}
    report = Report(fake, fake, fake, agree=alone, **arguments)  # type: ignore[arg-type]
    for number, loss in enumerate(losses, arguments["first_step"] + 1):
        report.step(
            number,
            metrics(loss),
            grad_norm=10.0 * number,
            lr=0.1 * number,
            epoch=number,
            ends=ends and number == arguments["first_step"] + len(losses),
        )
    assert [step for step, _ in fake.bar] == list(
        range(arguments["first_step"] + 1, arguments["first_step"] + len(losses) + 1)
    )
    return fake


def test_a_line_is_the_mean_since_the_line_before():
    fake = message([1.0, 2.0, 4.0, 1.0, 1.0, 4.0, 7.0, 8.0])
    # Each line twice: console and logs.
    steps = [step for step, _ in fake.lines]
    assert steps == [1, 1, 3, 3, 6, 6, 8, 8]
    losses = [values["loss"] for _, values in fake.lines[::2]]
    assert losses == [1.0, 3.0, 2.0, 7.5]
    _, last = fake.lines[-1]
    assert (last["grad_norm"], last["learning_rate"], last["epoch"]) == (80.0, 0.8, 8)
    assert last["rewards/margins"] == 3.0 and last["taken"] == 8
    assert [work.pairs for work in fake.works] == [2.0] * 8


def test_a_resumed_run_tells_of_its_first_step():
    fake = message([1.0, 2.0, 3.0], first_step=3)
    assert [step for step, _ in fake.lines[::2]] == [4, 6]


@pytest.mark.parametrize(("ends", "steps"), [(True, [1, 3, 5]), (False, [1, 3])])
def test_a_run_that_is_stopped_tells_of_its_last_steps(ends, steps):
    fake = message([1.0, 2.0, 3.0, 5.0, 7.0], ends=ends)
    assert [step for step, _ in fake.lines[::2]] == steps
    assert fake.lines[-1][1]["loss"] == (6.0 if ends else 2.5)


def test_the_memory_peak_is_the_highest_so_far():
    fake = Fake()
    report = Report(fake, fake, fake, every_steps=1, first_step=0, agree=alone)  # type: ignore[arg-type]
    for number, memory in enumerate((2e9, 5e9, 1e9), 1):
        report.step(
            number, metrics(1.0, memory=memory), grad_norm=1.0, lr=0.1, epoch=0.0, ends=False
        )
    values = [values for _, values in fake.lines[::2]]
    assert [value for one in values for name, value in one.items() if "GB" in name or "gb" in name]
    peaks = [max(value for name, value in one.items() if "gb" in name.lower()) for one in values]
    assert peaks == [2.0, 5.0, 5.0]


def test_an_evaluation_is_logged_under_its_names():
    fake = Fake()
    report = Report(fake, fake, fake, every_steps=1, first_step=0, agree=alone)  # type: ignore[arg-type]
    values = report.evaluation(2, metrics(0.5, pairs=4), seconds=1.5)
    assert values["eval_loss"] == 0.5 and values["eval_pairs"] == 4.0
    assert fake.lines == [(2, values)] and fake.evaluations == [(2, 0.5, 1.5)]


def test_a_stopwatch_runs():
    watch = Stopwatch()
    assert 0 <= watch.read() <= watch.read()


@pytest.mark.distributed
def test_what_was_logged_before_an_error_is_there(tiny, workers, tmp_path):
    """Loggers are closed, TensorBoard's too."""
    file = write_config(tiny, tmp_path / "run", logging={"every_steps": 1, "tensorboard": True})
    with pytest.raises(RuntimeError):
        workers.run(
            run, 1, file, Spoil("layers.1.mlp.linear_fc2.weight", float("nan"), before_step=3)
        )
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged: Any = [tag for tag in events.Tags()["scalars"] if tag.endswith("loss")]
    assert len(events.Scalars(logged[0])) == 2
