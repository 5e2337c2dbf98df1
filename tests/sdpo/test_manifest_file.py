"""Transitions of the manifest: equal on every rank; files are deleted after it is written."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.manifest import (
    FILE,
    Manifest,
    read_manifest,
    snapshot_directory,
    write_manifest,
)

from .tiny_manifest import identity, manifest, metrics, record

pytestmark = pytest.mark.distributed

PLANNED = manifest("pending", "pending")
LAYOUT = {"tensor": 2, "pipeline": 1, "context": 1}


def train(root: str, planned: Manifest, number: int) -> list[Manifest]:
    """The manifest on this rank after each transition of a step."""
    from megatron_idpo.checkpoint.snapshot_metadata import Snapshot
    from megatron_idpo.convert.model_source import FrozenModel
    from megatron_idpo.mcore.parallel.world import barrier
    from megatron_idpo.sdpo.manifest_file import ManifestFile

    def record_state() -> None:
        known.append(file.manifest)
        assert read_manifest(Path(root)) == file.manifest
        barrier()  # otherwise the first rank could write the next one while another reads

    known: list[Manifest] = []
    file = ManifestFile(Path(root), planned)
    record_state()
    before = identity("model" if number == 1 else f"snapshot{number - 1}")
    model = FrozenModel(cast(Any, None), before)
    file.mark_training(number, model, model, LAYOUT)
    record_state()
    whole = identity(f"snapshot{number}")
    snapshot = Snapshot(identity=whole, tensors=whole, base=None, files={}, total_bytes=269_000_000)
    odd = {"eval_nll": math.nan, "eval_norm": math.inf}
    file.mark_complete(number, snapshot, {**metrics(0.75, 0.125 * number), **odd})
    record_state()
    return known


def clean(root: str, fields: dict[str, Any], dies: bool = False) -> Manifest:
    """Delete what is not kept; with `dies`, fail at the first deletion of a snapshot."""
    from unittest import mock

    from megatron_idpo.sdpo.manifest_file import ManifestFile

    now = read_manifest(Path(root))
    assert now is not None
    file = ManifestFile(Path(root), now)
    sdpo = SdpoConfig.model_validate({"steps": [{}] * len(now.steps), **fields})
    if dies:
        location = "megatron_idpo.sdpo.manifest_file.delete_if_possible"
        with mock.patch(location, side_effect=CheckpointError("killed")):
            file.delete_unneeded(sdpo)
    file.delete_unneeded(sdpo)
    return file.manifest


def write_run(root: Path, now: Manifest) -> None:
    """A checkpoint for every step that has begun, a snapshot for every complete one."""
    write_manifest(root, now)
    for number, step in enumerate(now.steps, 1):
        directories = [root / f"step-{number}" / "checkpoints"] * (step.state != "pending")
        directories += [snapshot_directory(root, number)] * (step.state == "complete")
        for directory in directories:
            (directory / "sub").mkdir(parents=True)


def remaining(root: Path) -> list[str]:
    paths = [*root.glob("step-*/*"), *root.glob("snapshots/*")]
    return sorted(str(path.relative_to(root)) for path in paths)


def test_transitions_are_equal_on_every_rank(workers, tmp_path):
    first, second = workers.run(train, 2, str(tmp_path), PLANNED, 1)
    assert (
        first
        == second
        == [PLANNED, manifest("training", "pending"), manifest("complete", "pending")]
    )
    [steps] = workers.run(train, 1, str(tmp_path), PLANNED, 2)
    assert steps == [
        manifest("complete", "pending"),
        manifest("complete", "training"),
        manifest("complete", "complete"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_pending_steps_are_replaced_by_the_plan(workers, tmp_path):
    write_manifest(tmp_path, manifest("complete", "pending"))
    other = replace(PLANNED, steps=(PLANNED.steps[0], record(2, pairs=7), record(3)))
    [[begun, *_]] = workers.run(train, 1, str(tmp_path), other, 2)
    assert begun == replace(other, steps=(record(1, "complete"), *other.steps[1:]))


def test_manifest_of_another_run_is_rejected_and_unchanged(workers, tmp_path):
    write_manifest(tmp_path, manifest("complete", "pending"))
    before = (tmp_path / FILE).read_bytes()
    other = replace(PLANNED, target="first")
    with pytest.raises(CheckpointError, match=r"manifest\.json: sdpo\.target was previous"):
        workers.run(train, 2, str(tmp_path), other, 1)
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_bytes(before.replace(b"complete", b"pending"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed"):
        workers.run(train, 2, str(tmp_path), PLANNED, 1)


def test_path_that_cannot_be_written_is_reported(workers, tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be written"):
        workers.run(train, 2, str(tmp_path / "missing"), PLANNED, 1)


NOW = manifest("complete", "complete", "training", "pending")
CLEANED = {
    "checkpoints of complete steps": (
        {},
        ["snapshots/step-1", "snapshots/step-2", "step-3/checkpoints"],
    ),
    "all but the last snapshot": (
        {"keep_snapshots": "last"},
        ["snapshots/step-2", "step-3/checkpoints"],
    ),
    "nothing": (
        {"keep_checkpoints": True},
        [
            "snapshots/step-1",
            "snapshots/step-2",
            *(f"step-{number}/checkpoints" for number in (1, 2, 3)),
        ],
    ),
}


@pytest.mark.parametrize(("fields", "kept"), CLEANED.values(), ids=CLEANED)
def test_deletion(workers, tmp_path, fields, kept):
    write_run(tmp_path, NOW)
    for _ in range(2):
        first, second = workers.run(clean, 2, str(tmp_path), fields)
        assert remaining(tmp_path) == kept
        removed = "snapshots/step-1" not in kept
        assert first == second == NOW.with_step(1, is_removed=removed)
        assert read_manifest(tmp_path) == first


def test_interrupted_deletion_is_completed_by_the_next_start(workers, tmp_path):
    write_run(tmp_path, NOW)
    with pytest.raises(CheckpointError, match="killed"):
        workers.run(clean, 1, str(tmp_path), {"keep_snapshots": "last"}, dies=True)
    assert "snapshots/step-1" in remaining(tmp_path)
    now = read_manifest(tmp_path)
    assert now is not None and now.step(1).is_removed
    workers.run(clean, 1, str(tmp_path), {})
    assert remaining(tmp_path) == ["snapshots/step-2", "step-3/checkpoints"]
