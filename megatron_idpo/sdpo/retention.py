"""What a run of several steps need not keep: checkpoints of finished steps, older snapshots.

Only what the manifest calls complete is touched, so that a kill at any moment costs nothing; what
could not be deleted goes the next time. On one rank.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.sdpo.manifest import Manifest
from megatron_idpo.storage.directories import clear_leftovers

SNAPSHOTS = "snapshots"
_CHECKPOINTS = "checkpoints"


def snapshot_directory(root: Path, number: int) -> Path:
    """Where a step's snapshot is; steps are counted from 1."""
    return root / SNAPSHOTS / step_name(number)


def superfluous_snapshots(manifest: Manifest, sdpo: SdpoConfig) -> list[int]:
    """Steps whose snapshots need not stay: with `last`, all that the next step does not need."""
    complete = [n for n, step in enumerate(manifest.steps, 1) if step.state == "complete"]
    if sdpo.keep_snapshots == "all":
        return []
    return [number for number in complete[:-1] if not manifest.step(number).is_removed]


def delete_checkpoints(root: Path, number: int) -> None:
    """A step's training checkpoints; its snapshot is what counts now."""
    _delete(root / step_name(number) / _CHECKPOINTS)


def delete_snapshot(root: Path, number: int) -> None:
    """A step's snapshot, which the manifest calls removed."""
    _delete(snapshot_directory(root, number))


def clear_killed_snapshots(root: Path, number: int) -> None:
    """What a kill has left of a step's snapshot while it was written; nobody writes it now."""
    clear_leftovers(snapshot_directory(root, number))


def _delete(directory: Path) -> None:
    """It loses its name first, so that none is there by half."""
    if directory.is_dir():
        doomed = directory.with_name(f".{directory.name}.removed-{uuid4().hex[:8]}")
        with suppress(OSError):
            directory.rename(doomed)
    for path in directory.parent.glob(f".{directory.name}.removed-*"):
        shutil.rmtree(path, ignore_errors=True)
