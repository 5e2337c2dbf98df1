"""The manifest while a run goes on: one transition each, the same on every rank, deletion last."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.manifest import FILE, Manifest, read_manifest, write_manifest
from megatron_idpo.sdpo.retention import snapshot_directory

from .tiny_manifest import identity, manifest, metrics, record

pytestmark = pytest.mark.distributed

PLANNED = manifest("pending", "pending")
LAYOUT = {"tensor": 2, "pipeline": 1, "context": 1}


def train(root: str, planned: Manifest, number: int) -> list[Manifest]:
    """On a rank: the manifest after each transition of a step, as it is known here."""
    from megatron_idpo.checkpoint.snapshot_metadata import Snapshot
    from megatron_idpo.convert.frozen_model import FrozenModel
    from megatron_idpo.mcore.parallel.world import barrier
    from megatron_idpo.sdpo.manifest_file import ManifestFile

    def noted() -> None:
        known.append(file.manifest)
        assert read_manifest(Path(root)) == file.manifest
        barrier()  # or the first rank writes the next one while another still reads

    known: list[Manifest] = []
    file = ManifestFile(Path(root), planned)
    noted()
    before = identity("model" if number == 1 else f"snapshot{number - 1}")
    model = FrozenModel(cast(Any, None), before)
    file.begun(number, model, model, LAYOUT)
    noted()
    whole = identity(f"snapshot{number}")
    snapshot = Snapshot(identity=whole, tensors=whole, base=None, files={}, total_bytes=269_000_000)
    odd = {"eval_nll": math.nan, "eval_norm": math.inf}
    file.completed(number, snapshot, {**metrics(0.75, 0.125 * number), **odd})
    noted()
    return known


def clean(root: str, fields: dict[str, Any], dies: bool = False) -> Manifest:
    """On a rank: delete what need not stay; or die when the first snapshot should go."""
    from unittest import mock

    from megatron_idpo.sdpo.manifest_file import ManifestFile

    found = read_manifest(Path(root))
    assert found is not None
    file = ManifestFile(Path(root), found)
    sdpo = SdpoConfig.model_validate({"steps": [{}] * len(found.steps), **fields})
    if dies:
        location = "megatron_idpo.sdpo.manifest_file.delete_snapshot"
        with mock.patch(location, side_effect=CheckpointError("killed")):
            file.clean(sdpo)
    file.clean(sdpo)
    return file.manifest


def write_run(root: Path, now: Manifest) -> None:
    """Every step that has begun has a checkpoint, every complete one a snapshot too."""
    write_manifest(root, now)
    for number, step in enumerate(now.steps, 1):
        directories = [root / f"step-{number}" / "checkpoints"] * (step.state != "pending")
        directories += [snapshot_directory(root, number)] * (step.state == "complete")
        for directory in directories:
            (directory / "sub").mkdir(parents=True)


def there(root: Path) -> list[str]:
    found = [*root.glob("step-*/*"), *root.glob("snapshots/*")]
    return sorted(str(path.relative_to(root)) for path in found)


def test_one_transition_each_and_every_rank_knows(workers, tmp_path):
    one, other = workers.run(train, 2, str(tmp_path), PLANNED, 1)
    assert (
        one == other == [PLANNED, manifest("training", "pending"), manifest("complete", "pending")]
    )
    [steps] = workers.run(train, 1, str(tmp_path), PLANNED, 2)
    assert steps == [
        manifest("complete", "pending"),
        manifest("complete", "training"),
        manifest("complete", "complete"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_pending_steps_are_planned_anew(workers, tmp_path):
    write_manifest(tmp_path, manifest("complete", "pending"))
    other = replace(PLANNED, steps=(PLANNED.steps[0], record(2, pairs=7), record(3)))
    [[begun, *_]] = workers.run(train, 1, str(tmp_path), other, 2)
    assert begun == replace(other, steps=(record(1, "complete"), *other.steps[1:]))


def test_another_run_is_refused_on_every_rank_and_stays(workers, tmp_path):
    write_manifest(tmp_path, manifest("complete", "pending"))
    before = (tmp_path / FILE).read_bytes()
    other = replace(PLANNED, target="first")
    with pytest.raises(CheckpointError, match=r"manifest\.json: was begun with sdpo\.target"):
        workers.run(train, 2, str(tmp_path), other, 1)
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_bytes(before.replace(b"complete", b"pending"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed"):
        workers.run(train, 2, str(tmp_path), PLANNED, 1)


def test_a_place_that_cannot_be_written_is_reported(workers, tmp_path):
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


@pytest.mark.parametrize(("fields", "stay"), CLEANED.values(), ids=CLEANED)
def test_what_is_deleted(workers, tmp_path, fields, stay):
    write_run(tmp_path, NOW)
    for _ in range(2):
        one, other = workers.run(clean, 2, str(tmp_path), fields)
        assert there(tmp_path) == stay
        removed = "snapshots/step-1" not in stay
        assert one == other == NOW.with_step(1, is_removed=removed)
        assert read_manifest(tmp_path) == one


def test_a_kill_while_deleting_costs_nothing(workers, tmp_path):
    write_run(tmp_path, NOW)
    with pytest.raises(CheckpointError, match="killed"):
        workers.run(clean, 1, str(tmp_path), {"keep_snapshots": "last"}, dies=True)
    assert "snapshots/step-1" in there(tmp_path)
    found = read_manifest(tmp_path)
    assert found is not None and found.step(1).is_removed
    workers.run(clean, 1, str(tmp_path), {})
    assert there(tmp_path) == ["snapshots/step-2", "step-3/checkpoints"]
