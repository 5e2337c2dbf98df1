"""The end of a step: its order, and that repeating it gives the same result."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_idpo.errors import CheckpointError

from .stepped_run import (
    EXPORTING,
    Files,
    Outcome,
    manifest_of,
    run,
    snapshots,
    states,
    stepped_config,
)

pytestmark = pytest.mark.distributed


def run_without(file: str, owner: str) -> Outcome:
    """A run in which a function of the step's end fails."""
    with patch(owner, side_effect=CheckpointError.at("disk", "is full")):
        return run(file)


@pytest.mark.parametrize(
    "broken",
    [
        "snapshot.save_weights",
        pytest.param("finalize_step.export_result", marks=pytest.mark.exhaustive),
        pytest.param("finalize_step.write_snapshot", marks=pytest.mark.exhaustive),
    ],
)
def test_step_whose_end_fails_is_not_complete(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, broken: str
) -> None:
    """The next start repeats only the end, from the step's last checkpoint."""
    (whole, _), parts = finished("merge"), tmp_path / "parts"
    file = stepped_config(tiny, parts, steps=EXPORTING)
    with pytest.raises(CheckpointError, match="disk: is full"):
        workers.run(run_without, 1, file, f"megatron_idpo.sdpo.{broken}")
    assert states(parts) == ["training", "pending"]
    assert not (parts / "snapshots" / "step-1").exists()
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0 and "all 4 steps are complete" in outcome.printed
    assert snapshots(parts) == snapshots(whole)
    # Sizes differ by the length of the paths in the snapshots' metadata.
    ours, theirs = (
        [replace(step, snapshot_bytes=0) for step in manifest_of(output).steps]
        for output in (parts, whole)
    )
    assert ours == theirs


def run_uploading(file: str) -> list[str]:
    """The repositories that a run uploads to."""
    with (
        patch("megatron_idpo.sdpo.run.check_can_push"),
        patch("megatron_idpo.train.export.push") as push,
    ):
        assert run(file).code == 0
    return [call.args[0] for call in push.call_args_list]


def test_only_the_result_of_the_run_is_uploaded(tiny: Files, workers: Any, tmp_path: Path) -> None:
    export = {"push_to_hub": "me/aligned", "base_model": "org/base"}
    file = stepped_config(tiny, tmp_path / "run", steps=EXPORTING, export=export)
    assert workers.run(run_uploading, 1, file) == [["me/aligned"]]
    config = (tmp_path / "run" / "step-1" / "adapter" / "adapter_config.json").read_text()
    assert '"base_model_name_or_path": "org/base"' in config


@pytest.mark.parametrize(
    "target", ["previous", pytest.param("first", marks=pytest.mark.exhaustive)]
)
def test_earlier_adapter_is_removed_if_it_belongs_to_another_model(
    tiny: Files, workers: Any, tmp_path: Path, first_step: Any, target: str
) -> None:
    """The adapter of step 2 belongs to step 1's result, unless it starts from the first model."""
    output = tmp_path / "run"
    if target == "previous":
        first_step("merge", output)
    file = stepped_config(tiny, output, steps=EXPORTING, sdpo={"target": target})
    adapter = output / "adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    assert adapter.exists() == (target == "first")
    assert not list(output.glob(".adapter*"))
