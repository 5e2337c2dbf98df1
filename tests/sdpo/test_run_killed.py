"""SIGKILL at any moment of a run of three steps: it ends with the same weights, to the bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .stepped_run import THREE_STEPS, Files, stepped_config

SEVERAL = {"checkpoint": {"every_steps": 1}}
TIMEOUT_S = 1800.0
"""Of all trials; a few seconds each, more on a busy machine."""


@pytest.mark.parametrize(
    ("kind", "which", "trials"),
    [
        ("merge", "transitions", 2),
        pytest.param("merge", "all", 20, marks=pytest.mark.exhaustive),
        pytest.param("full", "transitions", 20, marks=pytest.mark.exhaustive),
        pytest.param("carry", "all", 20, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_and_started_again_it_ends_the_same(
    tiny: Files, tmp_path: Path, kind: str, which: str, trials: int
) -> None:
    """With dropout, a checkpoint after every optimizer step, and older snapshots deleted."""
    sections: dict[str, Any] = {**SEVERAL, "sdpo": {"keep_snapshots": "last"}}
    if kind != "full":
        sections["lora"] = {"dropout": 0.1}
    output = tmp_path / "run"
    file = stepped_config(tiny, output, kind, THREE_STEPS, **sections)
    unbroken, *found = crash_trials(file, output, tmp_path, which, trials)
    assert unbroken["ended"] == 0 and unbroken["calls"] > 100
    assert len(set(unbroken["snapshots"])) == 3 and None not in unbroken["snapshots"]
    assert len(found) == trials
    for trial in found:
        assert trial["ended"] == -9, trial
        assert trial["again"] == 0, trial
        for name in ("weights", "snapshots", "references"):
            assert trial[name] == unbroken[name], (name, trial)
        assert trial["leftovers"] == [], trial


def crash_trials(
    file: str, output: Path, answers: Path, which: str, trials: int
) -> list[dict[str, Any]]:
    """The unbroken run and every trial."""
    module = "tests.sdpo.crash_trials"
    command = [sys.executable, "-m", module, file, str(output), str(answers), which, str(trials)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
