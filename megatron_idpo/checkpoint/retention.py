"""The checkpoints of a run on disk: which exist, which are kept, what a kill has left.

    OUTPUT/checkpoints/step-00000123/    a complete checkpoint: it was renamed to this
    OUTPUT/checkpoints/.step-…           being written or deleted, or left by a killed process

The newest checkpoint is determined from the names; there is no pointer file that could be wrong.
Nothing here is collective; one rank calls.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal

from megatron_idpo.checkpoint.contents import read_contents
from megatron_idpo.checkpoint.metadata import FILE as PROGRESS
from megatron_idpo.checkpoint.metadata import Record
from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage import atomic

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.\w+-\w+")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint."""

    directory: Path
    step: int
    score: float | None
    """Value of the metric that it is ranked by; None if it was not measured."""

    metric: str | None = None
    """Name of that metric; None if unknown."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints of a run are kept."""

    keep_last: int
    """Number of the newest, 1 or more."""

    keep_best: int
    """Number of the best, 0 or more; of equal scores the newer one."""

    better: Literal["min", "max"]
    """Whether a low or a high score is better."""

    metric: str | None = None
    """The metric that is ranked: scores of another one are ignored. None ranks every score."""

    def ranked(self, checkpoints: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """The checkpoints with a score of this metric, the best first."""
        sign = 1.0 if self.better == "min" else -1.0
        scored = [
            (sign * info.score, -info.step, info)
            for info in checkpoints
            if info.score is not None and not isnan(info.score)
            if self.metric in (None, info.metric)
        ]
        return [info for _, _, info in sorted(scored, key=lambda entry: entry[:2])]

    def superfluous(self, checkpoints: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """The checkpoints that are not kept, the oldest first."""
        by_step = sorted(checkpoints, key=lambda info: info.step)
        kept = {info.step for info in by_step[-self.keep_last :]}
        kept |= {info.step for info in self.ranked(by_step)[: self.keep_best]}
        return [info for info in by_step if info.step not in kept]


def checkpoint_directory(root: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return root / f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[CheckpointInfo]:
    """Every complete checkpoint, ordered by step.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    checkpoints = []
    for path in _entries(root):
        name = _NAME.fullmatch(path.name)
        if name and path.is_dir():
            checkpoints.append(CheckpointInfo(path, int(name[1]), *_score(path)))
    return sorted(checkpoints, key=lambda info: info.step)


def prune(root: Path, retention: Retention) -> list[CheckpointInfo]:
    """Deletes what need not be kept; returns the remaining checkpoints, ordered by step.

    A checkpoint is renamed before it is deleted, so that a kill leaves no partly deleted one under
    its name. Files that cannot be deleted now (NFS, open in another process) are deleted by a later
    call.

    Raises:
        CheckpointError: a checkpoint cannot be renamed.
    """
    checkpoints = complete_checkpoints(root)
    superfluous = retention.superfluous(checkpoints)
    for info in superfluous:
        with CheckpointError.on_os_error(str(info.directory), "cannot be deleted"):
            atomic.delete_directory(info.directory)
    for path in root.glob(".step-*.removed-*"):
        atomic.discard_directory(path)
    return [info for info in checkpoints if info not in superfluous]


def clear_leftovers(root: Path) -> None:
    """Deletes what interrupted runs left; no other run may be writing there.

    A checkpoint that was about to be replaced, on a file system that cannot exchange names, is
    restored if the new one was not renamed yet.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    for path in _entries(root):
        if leftover := _LEFTOVER.fullmatch(path.name):
            atomic.clear_leftovers(root / leftover[1])


def _score(directory: Path) -> tuple[float | None, str | None]:
    """Score and metric of a checkpoint; None for a damaged one, which `load` reports."""
    try:
        read_contents(directory, is_state=True).check_files([PROGRESS])
        record = Record.read(directory)
    except CheckpointError:
        return None, None
    return record.score, record.metric


def _entries(root: Path) -> list[Path]:
    with CheckpointError.on_os_error(str(root), "cannot be read"):
        return sorted(root.iterdir()) if root.exists() else []
