"""Deletion of unneeded snapshots and checkpoints, which may be interrupted at any moment."""

import shutil
from pathlib import Path
from unittest import mock

import pytest

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.sdpo.manifest import Manifest, snapshot_directory
from megatron_idpo.sdpo.manifest_file import delete_if_possible, unneeded_snapshots

from .tiny_manifest import manifest

ALL = SdpoConfig.model_validate({"steps": [{}]})
LAST = SdpoConfig.model_validate({"steps": [{}], "keep_snapshots": "last"})


def filled(directory: Path) -> Path:
    """Create a directory with a read-only file, like a snapshot's."""
    directory.mkdir(parents=True)
    (directory / "weights").write_text("x")
    (directory / "weights").chmod(0o444)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


KEPT: dict[str, tuple[Manifest, list[int]]] = {
    "nothing complete": (manifest("training", "pending"), []),
    "one, which the next step needs": (manifest("complete", "training"), []),
    "one, which the next step will need": (manifest("complete", "pending"), []),
    "older ones": (manifest("complete", "complete", "complete", "training"), [1, 2]),
    "at the end": (manifest("complete", "complete"), [1]),
    "one that is removed": (
        manifest("complete", "complete", "complete").with_step(1, is_removed=True),
        [2],
    ),
}


@pytest.mark.parametrize(("now", "gone"), KEPT.values(), ids=KEPT)
def test_newest_snapshot_is_kept(now: Manifest, gone: list[int]) -> None:
    assert unneeded_snapshots(now, LAST) == gone
    assert unneeded_snapshots(now, ALL) == []


def test_only_the_given_directory_is_deleted(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        filled(tmp_path / f"step-{number}" / "checkpoints" / "step-00000004")
    filled(tmp_path / "step-1" / "hf")
    for _ in range(2):
        delete_if_possible(tmp_path / "step-1" / "checkpoints")
        assert names(tmp_path / "step-1") == ["hf"]
    delete_if_possible(tmp_path / "step-3" / "checkpoints")
    assert names(tmp_path) == ["step-1", "step-10", "step-2"]
    assert names(tmp_path / "step-2") == names(tmp_path / "step-10") == ["checkpoints"]


def test_snapshot_with_read_only_files_is_deleted(tmp_path: Path) -> None:
    assert snapshot_directory(tmp_path, 1) == tmp_path / "snapshots" / "step-1"
    delete_if_possible(snapshot_directory(tmp_path, 1))
    for number in (1, 2, 10):
        filled(snapshot_directory(tmp_path, number))
    for _ in range(2):
        delete_if_possible(snapshot_directory(tmp_path, 1))
        assert names(tmp_path / "snapshots") == ["step-10", "step-2"]


def test_directory_is_renamed_before_its_files_are_deleted(tmp_path: Path) -> None:
    directory = filled(snapshot_directory(tmp_path, 1))
    filled(directory.with_name(".step-10.removed-ab"))
    with mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            delete_if_possible(snapshot_directory(tmp_path, 1))
    assert not directory.exists()
    (hidden,) = directory.parent.glob(".step-1.removed-*")
    assert (hidden / "weights").is_file()
    delete_if_possible(snapshot_directory(tmp_path, 1))
    assert names(directory.parent) == [".step-10.removed-ab"]


def test_leftovers_of_several_kills_are_deleted(tmp_path: Path) -> None:
    for name in (".checkpoints.removed-ab", ".checkpoints.removed-cd", "checkpoints"):
        filled(tmp_path / "step-1" / name)
    delete_if_possible(tmp_path / "step-1" / "checkpoints")
    assert names(tmp_path / "step-1") == []


def test_failed_deletion_is_retried_by_the_next_call(tmp_path: Path) -> None:
    directory = filled(snapshot_directory(tmp_path, 1))
    with mock.patch.object(Path, "rename", side_effect=PermissionError(13, "Permission denied")):
        delete_if_possible(snapshot_directory(tmp_path, 1))
    assert names(directory) == ["weights"]
    delete_if_possible(snapshot_directory(tmp_path, 1))
    assert names(tmp_path / "snapshots") == []
