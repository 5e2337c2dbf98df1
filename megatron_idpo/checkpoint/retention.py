"""The checkpoints of a run on disk: which there are, which stay, what a kill has left behind.

    OUTPUT/checkpoints/step-00000123/    a complete checkpoint: it got its name by a rename
    OUTPUT/checkpoints/.step-…           being written or deleted, or left over from that

Which one is the newest is read off the names, so there is no pointer that could be wrong.
Nothing here is collective; one rank calls.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal
from uuid import uuid4

from megatron_idpo.checkpoint.metadata import Record
from megatron_idpo.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(incomplete|replaced|removed)-\w+")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint."""

    directory: Path
    step: int
    score: float | None
    """What it is ranked by; None where nothing was measured."""

    metric: str | None = None
    """What the score measures; None where nobody said."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints of a run stay."""

    keep_last: int
    """The newest ones, 1 or more."""

    keep_best: int
    """The best ones, 0 or more; of equals the newer."""

    better: Literal["min", "max"]
    """Whether a small score is good or a large one."""

    metric: str | None = None
    """What is ranked: scores of another metric do not count. None takes every score."""

    def ranked(self, checkpoints: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those with a score of this metric, the best first."""
        sign = 1.0 if self.better == "min" else -1.0
        scored = [
            (sign * one.score, -one.step, one)
            for one in checkpoints
            if one.score is not None and not isnan(one.score) and self._counts(one)
        ]
        return [one for _, _, one in sorted(scored, key=lambda entry: entry[:2])]

    def _counts(self, checkpoint: CheckpointInfo) -> bool:
        return self.metric is None or checkpoint.metric == self.metric

    def superfluous(self, checkpoints: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those that need not stay, the oldest first."""
        by_step = sorted(checkpoints, key=lambda one: one.step)
        kept = {one.step for one in by_step[-self.keep_last :]}
        kept |= {one.step for one in self.ranked(by_step)[: self.keep_best]}
        return [one for one in by_step if one.step not in kept]


def target_of(root: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return root / f"step-{step:08d}"


def complete_checkpoints(root: Path) -> list[CheckpointInfo]:
    """Every complete checkpoint, by step.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    found = []
    for path in _entries(root):
        name = _NAME.fullmatch(path.name)
        if name and path.is_dir():
            found.append(CheckpointInfo(path, int(name[1]), *_score(path)))
    return sorted(found, key=lambda one: one.step)


def prune(root: Path, retention: Retention) -> list[CheckpointInfo]:
    """Delete what need not stay; returns what stayed, by step.

    A checkpoint loses its name first, so that a kill leaves none half deleted under it. Files that
    cannot be deleted at once (NFS, while somebody reads them) go with a later call.

    Raises:
        CheckpointError: a checkpoint cannot be renamed.
    """
    checkpoints = complete_checkpoints(root)
    superfluous = retention.superfluous(checkpoints)
    for one in superfluous:
        try:
            one.directory.rename(root / f".{one.directory.name}.removed-{uuid4().hex[:8]}")
        except OSError as error:
            raise CheckpointError.at(
                str(one.directory), f"cannot be deleted: {error.strerror}"
            ) from error
    for path in _entries(root):
        if (kind := _LEFTOVER.fullmatch(path.name)) and kind[1] == "removed":
            _delete(path)
    return [one for one in checkpoints if one not in superfluous]


def clear_leftovers(root: Path) -> None:
    """Delete what interrupted runs left. Not while another run writes there.

    A checkpoint that was to be replaced, by a file system without an exchange of names, comes back
    if the new one never got its name.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    for path in _entries(root):
        kind = _LEFTOVER.fullmatch(path.name)
        if kind is None:
            continue
        name = path.name[1:].split(".", 1)[0]
        if kind[1] == "replaced" and not (root / name).exists():
            path.rename(root / name)
        else:
            _delete(path)


def _score(directory: Path) -> tuple[float | None, str | None]:
    """What a checkpoint is ranked by, and the metric's name.

    A damaged one has no score, and `load` says what it has.
    """
    try:
        record = Record.read(directory)
    except CheckpointError:
        return None, None
    return record.score, record.metric


def _entries(root: Path) -> Iterator[Path]:
    try:
        yield from sorted(root.iterdir()) if root.exists() else ()
    except OSError as error:
        raise CheckpointError.at(str(root), f"cannot be read: {error.strerror}") from error


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
