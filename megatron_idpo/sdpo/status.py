"""The verb `sdpo status RUN`: what has become of each step, and what would happen next.

From files alone; nothing is changed, and a run that is going on is not disturbed.
"""

from pathlib import Path

from rich.console import Console

from megatron_idpo.checkpoint.retention import complete_checkpoints
from megatron_idpo.checkpoint.snapshot_metadata import (
    check_digests,
    check_names,
    file_digest,
    read_snapshot,
    remedy,
)
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.sdpo.manifest import FILE, Manifest, StepRecord, read_manifest
from megatron_idpo.sdpo.retention import snapshot_directory
from megatron_idpo.sdpo.table import NOTHING, format_size, short_identity, terminal_table


def main(root: Path, *, check: bool) -> int:
    """Show a run's steps.

    Args:
        root: the run's `training.output`.
        check: read every byte of every snapshot.

    Raises:
        UserError: there is no such run; its manifest or a snapshot has been changed.
    """
    manifest = read_manifest(root)
    if manifest is None:
        message = f"is no run of several steps: there is no {FILE}"
        raise ConfigError.at(str(root), message, "name the training.output of a run with sdpo")
    console = Console(highlight=False)
    console.print(terminal_table(manifest))
    for line in identities(manifest):
        console.print(line, soft_wrap=True, markup=False)
    if check:
        for number in snapshots_there(manifest):
            check_snapshot(snapshot_directory(root, number), manifest.step(number).snapshot or "")
            console.print(f"step {number}: every byte of its snapshot is as it was written")
    console.print(f"next: {what_is_next(root, manifest)}", soft_wrap=True, markup=False)
    return 0


def identities(manifest: Manifest) -> list[str]:
    """What each begun step starts from and is compared to, so that the chain can be followed."""
    adapters = "" if manifest.adapters is None else f", adapters {manifest.adapters}"
    lines = [
        f"first model {short_identity(manifest.model_identity)} ({manifest.model}); "
        f"target {manifest.target}{adapters}"
    ]
    for number, step in enumerate(manifest.steps, start=1):
        if step.state != "pending":
            sizes = {name: size for name, size in step.layout.items() if name in _SIZES}
            message = ", ".join(f"{name} {size}" for name, size in sizes.items())
            lines.append(
                f"step {number}: starts from {short_identity(step.start)}, reference "
                f"{short_identity(step.reference)}, layout {message or NOTHING}, "
                f"snapshot {format_snapshot(step)}"
            )
    return lines


def format_snapshot(step: StepRecord) -> str:
    """A step's snapshot and its size."""
    if step.snapshot is None:
        return "none yet"
    message = f"{short_identity(step.snapshot)} ({format_size(step.snapshot_bytes)})"
    return f"{message}, removed" if step.is_removed else message


_SIZES = ("tensor", "pipeline")


def snapshots_there(manifest: Manifest) -> list[int]:
    """The steps whose snapshots should be there."""
    return [
        number
        for number, step in enumerate(manifest.steps, start=1)
        if step.state == "complete" and not step.is_removed
    ]


def check_snapshot(directory: Path, identity: str) -> None:
    """Compare every file of a snapshot with its hash, in this process.

    Raises:
        CheckpointError: it is another snapshot, a file is missing, was added or has been changed.
    """
    snapshot = read_snapshot(directory)
    if snapshot.identity != identity:
        message = "is another snapshot than the manifest names"
        raise CheckpointError.at(str(directory), message, remedy(directory))
    check_names(directory, snapshot)
    digests = [file_digest(directory / name) for name in snapshot.files]
    check_digests(directory, snapshot, digests)


def what_is_next(root: Path, manifest: Manifest) -> str:
    """What `train` would do with the same configuration."""
    number = manifest.next_step
    if number is None:
        return "nothing, every step is complete"
    step, checkpoints = manifest.step(number), root / step_name(number) / "checkpoints"
    found = complete_checkpoints(checkpoints)
    if step.state == "training" and found:
        return f"step {number} goes on after its optimizer step {found[-1].step:,}"
    if number == 1:
        return f"step 1 is trained on {step.pairs:,} pairs from its beginning"
    before = short_identity(manifest.step(number - 1).snapshot)
    start = "the first model" if manifest.target == "first" else "that"
    return (
        f"step {number} is trained on {step.pairs:,} pairs; reference: step {number - 1}'s "
        f"snapshot {before}; start: {start}"
    )
