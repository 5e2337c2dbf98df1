"""After a kill at any point of a save, the next run finds a complete checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .crash_trials import SECOND_VALUE, crash_trials

pytestmark = pytest.mark.distributed

DETECTION_S = 30
"""Limit for a rank to detect that another has died; it takes fractions of a second."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_hf_model(tmp_path_factory.mktemp("model"), "llama", **tiny.SIZES)


@pytest.fixture
def trials(model: Path, workers: Any, tmp_path: Path) -> Callable[..., list[Any]]:
    """Gives the result of every trial; each must have found a complete checkpoint."""

    def run(mode: str, first: int, stride: int, count: int) -> list[Any]:
        arguments = (str(model), tmp_path, mode, first, stride, count)
        (answers,) = workers.run_as_program(crash_trials, 1, *arguments, timeout_s=900)
        check(answers)
        return answers  # type: ignore[no-any-return]

    return run


def check(answers: list[Any]) -> None:
    for answer in answers:
        assert answer["loaded"] == answer["step"], answer
        assert len(answer["values"]) == 1, f"a checkpoint of two steps: {answer}"
        assert all(name.startswith("step-") for name in answer["names"]), answer


SPARSE = (4, 23, 100)
EVERY = (0, 1, 100)


@pytest.mark.parametrize(
    "calls", [SPARSE, pytest.param(EVERY, marks=pytest.mark.exhaustive)], ids=["sparse", "every"]
)
def test_kill_at_a_file_system_call(trials, calls):
    answers = trials("next", *calls)
    assert [answer["ended"] for answer in answers] == [-9] * (len(answers) - 1) + [0]
    assert all(answer["values"] == [answer["step"]] for answer in answers)
    steps = [answer["step"] for answer in answers]
    assert steps == sorted(steps) and set(steps) == {2, 3}
    assert any(answer["left"] for answer in answers)
    assert answers[-1]["names"] == ["step-00000003"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["again", "again-without-exchange"])
def test_kill_while_replacing_a_checkpoint(trials, mode):
    answers = trials(mode, *EVERY)
    assert [answer["ended"] for answer in answers] == [-9] * (len(answers) - 1) + [0]
    assert {tuple(answer["values"]) for answer in answers} == {(2.0,), (SECOND_VALUE,)}
    assert answers[-1]["values"] == [SECOND_VALUE]
    assert all(answer["names"] == ["step-00000002"] for answer in answers)


@pytest.mark.exhaustive
def test_kill_of_one_of_two_ranks_at_any_time(trials):
    answers = trials("anytime", 0, 1, 10)
    for answer in answers:
        assert sorted(answer["ended"]) == [-9, 1]
        assert answer["took_s"] < DETECTION_S
        assert answer["values"] == [answer["step"]]
