"""Transitions of the manifest during a run, and deletion of what complete steps do not need.

Every rank knows the manifest; the first rank writes it, once per transition. Files are deleted only
after the written manifest no longer refers to them, so that a kill at any moment loses nothing.
What could not be deleted is deleted by the next start.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_idpo.checkpoint.snapshot_metadata import Snapshot
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.world import broadcast_from_rank0, is_rank0, raise_on_all_ranks
from megatron_idpo.sdpo.manifest import (
    FILE,
    Manifest,
    merge_manifests,
    read_manifest,
    snapshot_directory,
    write_manifest,
)
from megatron_idpo.storage import atomic


class ManifestFile:
    """The manifest of the current run. Every method is collective.

    Attributes:
        root: the run's directory.
        manifest: as written.
    """

    def __init__(self, root: Path, planned: Manifest) -> None:
        """Continue the existing manifest, or start one.

        Args:
            root: the run's directory.
            planned: of the current configuration, every step pending.

        Raises:
            CheckpointError: on every rank; the existing one is of another run, or was changed.
        """
        self.root = root
        with raise_on_all_ranks("reading the manifest"):
            saved = read_manifest(root) if is_rank0() else None
            if saved is not None:
                planned = merge_manifests(root, saved, planned)
        self.manifest = broadcast_from_rank0(lambda: planned)
        self._write()

    def mark_training(
        self, number: int, start: FrozenModel, reference: FrozenModel, layout: dict[str, Any]
    ) -> None:
        """Record the models of a step before it is trained or resumed.

        Raises:
            CheckpointError: on every rank; it began from or against another model.
        """
        record = self.manifest.step(number)
        for role, saved, current in (
            ("start", record.start, start.identity),
            ("reference", record.reference, reference.identity),
        ):
            if saved is not None and saved != current:
                message = f"step {number} began with another {role} ({saved[:12]}, now "
                remedy = "restore that model, or start again in another training.output"
                raise CheckpointError.at(str(self.root / FILE), f"{message}{current[:12]})", remedy)
        self._change(
            number,
            state="training",
            start=start.identity,
            reference=reference.identity,
            layout=layout,
        )

    def mark_complete(self, number: int, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """Record a step's snapshot, which has its final name. NaN and infinity are left out."""
        self._change(
            number,
            state="complete",
            snapshot=snapshot.identity,
            snapshot_bytes=snapshot.total_bytes,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        )

    def delete_unneeded(self, sdpo: SdpoConfig) -> None:
        """Delete checkpoints and snapshots that are not kept, and what kills have left.

        Raises:
            CheckpointError: on every rank; the manifest cannot be written.
        """
        for number in unneeded_snapshots(self.manifest, sdpo):
            self._change(number, is_removed=True)
        with raise_on_all_ranks("deleting unneeded checkpoints and snapshots"):
            if is_rank0():
                for number, step in enumerate(self.manifest.steps, start=1):
                    snapshot = snapshot_directory(self.root, number)
                    atomic.clear_leftovers(snapshot)
                    if step.is_removed:
                        delete_if_possible(snapshot)
                    if step.state == "complete" and not sdpo.keep_checkpoints:
                        delete_if_possible(self.root / step_name(number) / "checkpoints")

    def _change(self, number: int, **changes: Any) -> None:
        self.manifest = self.manifest.with_step(number, **changes)
        self._write()

    def _write(self) -> None:
        with raise_on_all_ranks("writing the manifest"):
            if is_rank0():
                write_manifest(self.root, self.manifest)


def unneeded_snapshots(manifest: Manifest, sdpo: SdpoConfig) -> list[int]:
    """Steps whose snapshots can go: with `keep_snapshots: last`, all but the newest."""
    if sdpo.keep_snapshots == "all":
        return []
    older = list(manifest.complete_steps.items())[:-1]
    return [number for number, step in older if not step.is_removed]


def delete_if_possible(directory: Path) -> None:
    """Delete a directory if it exists, and what an interrupted deletion of it left."""
    atomic.clear_leftovers(directory)
    if directory.is_dir():
        with suppress(OSError):  # retried by the next start
            atomic.delete_directory(directory)
