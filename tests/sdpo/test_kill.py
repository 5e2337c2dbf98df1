"""A run killed at any moment and started again ends with bitwise equal weights."""

from pathlib import Path
from typing import Any

import pytest

from .crash_trials import crash_trials
from .stepped_run import THREE_STEPS, TWO_STEPS, Files, stepped_config

pytestmark = pytest.mark.distributed

CHECKPOINTS = {"checkpoint": {"every_steps": 1}}
TIMEOUT_S = 1800.0
"""Of all trials; a few seconds each, longer on a busy machine."""


@pytest.mark.parametrize(
    ("kind", "which", "trials"),
    [
        ("merge", "transitions", 2),
        pytest.param("merge", "all", 20, marks=pytest.mark.exhaustive),
        pytest.param("full", "transitions", 20, marks=pytest.mark.exhaustive),
        pytest.param("carry", "all", 20, marks=pytest.mark.exhaustive),
    ],
)
def test_run_killed_at_a_file_system_call_ends_bitwise_equal(
    tiny: Files, workers: Any, tmp_path: Path, kind: str, which: str, trials: int
) -> None:
    """With dropout, a checkpoint per optimizer step, and deletion of older snapshots.

    The short case has two steps of two optimizer steps each.
    """
    is_short = trials < 20
    sections: dict[str, Any] = {**CHECKPOINTS, "sdpo": {"keep_snapshots": "last"}}
    if is_short:
        sections["training"] = {"epochs": 1}
    steps = TWO_STEPS if is_short else THREE_STEPS
    if kind != "full":
        sections["lora"] = {"dropout": 0.1}
    output = tmp_path / "run"
    file = stepped_config(tiny, output, kind, steps, **sections)
    ((whole, *results),) = workers.run_as_program(
        crash_trials, 1, Path(file), output, which, trials, timeout_s=TIMEOUT_S
    )
    assert whole["ended"] == 0 and whole["calls"] > 100
    assert len(set(whole["snapshots"])) == len(steps) and None not in whole["snapshots"]
    assert len(results) == trials
    for trial in results:
        assert trial["ended"] == -9, trial
        assert trial["again"] == 0, trial
        for name in ("weights", "snapshots", "references"):
            assert trial[name] == whole[name], (name, trial)
        assert trial["leftovers"] == [], trial
