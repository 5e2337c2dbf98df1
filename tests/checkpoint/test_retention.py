"""Which checkpoints exist, which are kept, and what happens to leftovers."""

import shutil
from pathlib import Path
from unittest import mock

import pytest

from megatron_idpo.checkpoint.contents import write_contents
from megatron_idpo.checkpoint.metadata import Record
from megatron_idpo.checkpoint.retention import (
    CheckpointInfo,
    Retention,
    checkpoint_directory,
    clear_leftovers,
    complete_checkpoints,
    prune,
)
from megatron_idpo.errors import CheckpointError

from .tiny_training import progress


def make(root: Path, step: int, score: float | None = None, metric: str | None = None) -> Path:
    directory = checkpoint_directory(root, step)
    directory.mkdir(parents=True)
    record = Record(progress=progress(step), score=score, metric=metric, optimizer_steps=step)
    record.write(directory)
    write_contents(directory, {}, target=directory)
    return directory


def steps(root: Path) -> list[int]:
    return [info.step for info in complete_checkpoints(root)]


def infos(scores: dict[int, float | None]) -> list[CheckpointInfo]:
    return [CheckpointInfo(Path(str(step)), step, score) for step, score in scores.items()]


NAN = float("nan")
KEPT = {
    # scores by step, keep_last, keep_best, better, kept steps
    "the newest": ({1: 0.1, 2: 0.2, 3: 0.3}, 1, 0, "min", [3]),
    "two of them": ({1: None, 2: None, 3: None}, 2, 1, "min", [2, 3]),
    "all": ({1: None, 2: None}, 5, 5, "min", [1, 2]),
    "the smallest": ({1: 0.1, 2: 0.2, 3: 0.3}, 1, 1, "min", [1, 3]),
    "the largest": ({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2}, 1, 2, "max", [2, 3, 4]),
    "newer of equals": ({1: 0.1, 2: 0.1, 3: 0.3}, 1, 1, "min", [2, 3]),
    "the best is the newest": ({1: 0.2, 2: 0.3, 3: 0.1}, 1, 1, "min", [3]),
    "not a number": ({1: NAN, 2: 0.5, 3: None}, 1, 1, "max", [2, 3]),
}


@pytest.mark.parametrize(("scores", "last", "best", "better", "stay"), KEPT.values(), ids=KEPT)
def test_kept_checkpoints(scores, last, best, better, stay):
    every = infos(scores)
    gone = [info.step for info in Retention(last, best, better).superfluous(every[::-1])]
    assert gone == sorted(set(scores) - set(stay))


def test_prune_deletes_the_others(tmp_path):
    for step, score in ((9, 0.5), (10, 0.1), (100, 0.3), (123456789, 0.2)):
        make(tmp_path, step, score)
    stayed = prune(tmp_path, Retention(1, 1, "min"))
    assert [(info.step, info.score) for info in stayed] == [(10, 0.1), (123456789, 0.2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-123456789"]


def test_scores_of_another_metric_are_not_ranked(tmp_path):
    """After a change of `best_metric`: 0.9 is a loss, the others are accuracies."""
    make(tmp_path, 1, 0.9, "eval_loss")
    make(tmp_path, 2, 0.6, "eval_rewards/accuracies")
    make(tmp_path, 3, 0.5, "eval_rewards/accuracies")
    make(tmp_path, 4, 0.95)
    make(tmp_path, 5)
    retention = Retention(1, 1, "max", "eval_rewards/accuracies")
    assert [info.step for info in retention.ranked(complete_checkpoints(tmp_path))] == [2, 3]
    assert [info.step for info in prune(tmp_path, retention)] == [2, 5]


def test_checkpoint_is_renamed_before_it_is_deleted(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2)
    with mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, Retention(1, 0, "min"))
    assert steps(tmp_path) == [2]
    (hidden,) = tmp_path.glob(".step-00000001.removed-*")
    assert (hidden / "progress.json").is_file()
    prune(tmp_path, Retention(1, 0, "min"))
    assert not hidden.exists()


def test_failed_rename_is_reported(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2)
    with mock.patch.object(Path, "rename", side_effect=PermissionError(13, "Permission denied")):
        with pytest.raises(CheckpointError, match=r"step-00000001: cannot be deleted: Permission"):
            prune(tmp_path, Retention(1, 0, "min"))
    assert steps(tmp_path) == [1, 2]


def test_only_complete_checkpoints_are_listed(tmp_path):
    assert complete_checkpoints(tmp_path / "nowhere") == []
    make(tmp_path, 3)
    for name in (".step-00000004.incomplete-ab", "step-4", "step-00000005.old", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000006").touch()
    assert steps(tmp_path) == [3]


def test_damaged_checkpoint_has_no_score(tmp_path):
    """It is still listed as the newest: `load` reports the damage."""
    make(tmp_path, 1, 0.1)
    (make(tmp_path, 2, 0.0) / "progress.json").write_text("{")
    assert [info.score for info in complete_checkpoints(tmp_path)] == [0.1, None]


def test_leftovers_are_deleted_and_replaced_checkpoints_restored(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2).rename(tmp_path / ".step-00000002.replaced-ab")
    for name in (
        ".step-00000001.replaced-cd",
        ".step-00000003.incomplete-ef",
        ".step-00000004.removed-01",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".hidden", ".step-00000005", "step-00000009.incomplete-ab"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    assert steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden",
        ".step-00000005",
        "step-00000001",
        "step-00000002",
        "step-00000009.incomplete-ab",
    ]


def test_unreadable_directory_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: cannot be read: Not a directory"):
        complete_checkpoints(tmp_path / "file")
