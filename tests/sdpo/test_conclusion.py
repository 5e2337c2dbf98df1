"""The end of a step: in which order, and that doing it again does the same."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_idpo.errors import CheckpointError

from .stepped_run import Files, Outcome, manifest_of, run, snapshots, states, stepped_config

pytestmark = pytest.mark.distributed


def run_without(file: str, owner: str) -> Outcome:
    """A run in which something of a step's end cannot be done."""
    with patch(owner, side_effect=CheckpointError.at("disk", "is full")):
        return run(file)


@pytest.mark.parametrize(
    "broken",
    [
        "snapshot.save_weights",
        pytest.param("conclusion.export_result", marks=pytest.mark.exhaustive),
        pytest.param("conclusion.write_snapshot", marks=pytest.mark.exhaustive),
    ],
)
def test_a_step_whose_end_fails_is_not_complete(
    tiny: Files, workers: Any, tmp_path: Path, broken: str
) -> None:
    """And the next start does the end alone, from the step's last checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = [{"fraction": 0.5, "export": True}, {"fraction": 0.5}]
    assert workers.run(run, 1, stepped_config(tiny, whole, steps=steps))[0].code == 0
    file = stepped_config(tiny, parts, steps=steps)
    with pytest.raises(CheckpointError, match="disk: is full"):
        workers.run(run_without, 1, file, f"megatron_idpo.sdpo.{broken}")
    assert states(parts) == ["training", "pending"]
    assert not (parts / "snapshots" / "step-1").exists()
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0 and "all 4 steps have been taken" in outcome.printed
    assert snapshots(parts) == snapshots(whole)
    assert manifest_of(parts).steps == manifest_of(whole).steps


@pytest.mark.parametrize("target", ["previous", "first"])
def test_an_adapter_of_an_earlier_end_goes_where_it_would_be_wrong(
    tiny: Files, workers: Any, tmp_path: Path, target: str
) -> None:
    """On the first model it would be replaced; on step 1's result there is none."""
    output = tmp_path / "run"
    file = stepped_config(tiny, output, sdpo={"target": target})
    adapter = output / "adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    assert adapter.exists() == (target == "first")
    assert not list(output.glob(".adapter*"))
