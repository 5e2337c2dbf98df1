"""The manifest of the run at hand: known to every rank, written by the first, one transition each.

What is deleted is deleted after the manifest no longer needs it.
"""

import math
from pathlib import Path
from typing import Any

from megatron_idpo.checkpoint.snapshot_metadata import Snapshot
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.world import from_first, is_first_rank, raise_on_all_ranks
from megatron_idpo.sdpo.manifest import FILE, Manifest, continued, read_manifest, write_manifest
from megatron_idpo.sdpo.retention import (
    clear_killed_snapshots,
    delete_checkpoints,
    delete_snapshot,
    superfluous_snapshots,
)


class ManifestFile:
    """A run's manifest. Every method is collective."""

    def __init__(self, root: Path, planned: Manifest) -> None:
        """Go on with the manifest that is there, or begin one.

        Args:
            root: the run's directory.
            planned: the run as this configuration wants it, every step pending.

        Raises:
            CheckpointError: on every rank; what is there is of another run, or has been changed.
        """
        self.root = root
        """The run's directory."""

        with raise_on_all_ranks("reading the manifest"):
            found = read_manifest(root) if is_first_rank() else None
            if found is not None:
                planned = continued(root, found, planned)
        self.manifest = from_first(lambda: planned)
        """As it stands."""

        self._write()

    def begun(
        self, number: int, start: FrozenModel, reference: FrozenModel, layout: dict[str, Any]
    ) -> None:
        """A step's data and models are settled; it is trained now, or goes on.

        Raises:
            CheckpointError: on every rank; it was begun from or against another model.
        """
        before = self.manifest.step(number)
        for what, known, now in (
            ("start", before.start, start.identity),
            ("reference", before.reference, reference.identity),
        ):
            if known is not None and known != now:
                message = (
                    f"step {number} was begun with another {what} ({known[:12]}, now {now[:12]})"
                )
                remedy = "put that back as it was, or begin anew in another training.output"
                raise CheckpointError.at(str(self.root / FILE), message, remedy)
        self._change(
            number,
            state="training",
            start=start.identity,
            reference=reference.identity,
            layout=layout,
        )

    def completed(self, number: int, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """A step's snapshot has its name. Metrics that are no number are left out."""
        self._change(
            number,
            state="complete",
            snapshot=snapshot.identity,
            snapshot_bytes=snapshot.total_bytes,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        )

    def clean(self, sdpo: SdpoConfig) -> None:
        """Delete what complete steps need not keep, and what kills have left.

        Raises:
            CheckpointError: on every rank; the manifest cannot be written.
        """
        for number in superfluous_snapshots(self.manifest, sdpo):
            self._change(number, is_removed=True)
        with raise_on_all_ranks("deleting what is not needed"):
            if is_first_rank():
                self._delete(sdpo)

    def _delete(self, sdpo: SdpoConfig) -> None:
        for number, step in enumerate(self.manifest.steps, start=1):
            clear_killed_snapshots(self.root, number)
            if step.state == "complete" and not sdpo.keep_checkpoints:
                delete_checkpoints(self.root, number)
            if step.is_removed:
                delete_snapshot(self.root, number)

    def _change(self, number: int, **changes: Any) -> None:
        self.manifest = self.manifest.with_step(number, **changes)
        self._write()

    def _write(self) -> None:
        with raise_on_all_ranks("writing the manifest"):
            if is_first_rank():
                write_manifest(self.root, self.manifest)
