"""The verb `sdpo status RUN`: the state of each step, and what the next start would do.

It only reads files, and does not disturb a run in progress.
"""

from pathlib import Path

from rich.console import Console

from megatron_idpo.checkpoint.retention import complete_checkpoints
from megatron_idpo.checkpoint.snapshot_metadata import (
    check_digests,
    check_names,
    read_snapshot,
    remedy,
)
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.sdpo.manifest import (
    FILE,
    Manifest,
    StepRecord,
    read_manifest,
    snapshot_directory,
)
from megatron_idpo.sdpo.table import UNKNOWN, format_size, short_identity, terminal_table
from megatron_idpo.storage.provenance import file_digest

_SHOWN_SIZES = ("tensor", "pipeline")


def main(root: Path, *, check: bool) -> int:
    """Show the steps of a run.

    Args:
        root: the run's `training.output`.
        check: read every byte of every snapshot.

    Raises:
        UserError: there is no such run; its manifest or a snapshot has been changed.
    """
    manifest = read_manifest(root)
    if manifest is None:
        message = f"is not an sDPO run: it has no {FILE}"
        raise ConfigError.at(str(root), message, "name the training.output of a run with sdpo")
    console = Console(highlight=False)
    console.print(terminal_table(manifest))
    for line in identity_lines(manifest):
        console.print(line, soft_wrap=True, markup=False)
    if check:
        for number in existing_snapshots(manifest):
            verify_snapshot(snapshot_directory(root, number), manifest.step(number).snapshot or "")
            console.print(f"step {number}: snapshot verified, every byte is unchanged")
    console.print(f"next: {describe_next(root, manifest)}", soft_wrap=True, markup=False)
    return 0


def identity_lines(manifest: Manifest) -> list[str]:
    """Start and reference of each step that has begun, by identity."""
    adapters = "" if manifest.adapters is None else f", adapters {manifest.adapters}"
    lines = [
        f"first model {short_identity(manifest.model_identity)} ({manifest.model}); "
        f"target {manifest.target}{adapters}"
    ]
    for number, step in enumerate(manifest.steps, start=1):
        if step.state != "pending":
            sizes = [f"{name} {step.layout[name]}" for name in step.layout if name in _SHOWN_SIZES]
            lines.append(
                f"step {number}: starts from {short_identity(step.start)}, reference "
                f"{short_identity(step.reference)}, layout {', '.join(sizes) or UNKNOWN}, "
                f"snapshot {format_snapshot(step)}"
            )
    return lines


def format_snapshot(step: StepRecord) -> str:
    """Identity and size of a step's snapshot."""
    if step.snapshot is None:
        return "none yet"
    text = f"{short_identity(step.snapshot)} ({format_size(step.snapshot_bytes)})"
    return f"{text}, removed" if step.is_removed else text


def existing_snapshots(manifest: Manifest) -> list[int]:
    """Numbers of the steps whose snapshots should exist."""
    return [number for number, step in manifest.complete_steps.items() if not step.is_removed]


def verify_snapshot(directory: Path, identity: str) -> None:
    """Compare every file of a snapshot with its hash, in this process.

    Raises:
        CheckpointError: it is another snapshot, or a file is missing, was added or was changed.
    """
    snapshot = read_snapshot(directory)
    if snapshot.identity != identity:
        message = "is not the snapshot that the manifest names"
        raise CheckpointError.at(str(directory), message, remedy(directory))
    check_names(directory, snapshot)
    digests = [file_digest(directory / name) for name in snapshot.files]
    check_digests(directory, snapshot, digests)


def describe_next(root: Path, manifest: Manifest) -> str:
    """What `train` would do with the same configuration."""
    number = manifest.next_step
    if number is None:
        return "nothing, every step is complete"
    step = manifest.step(number)
    checkpoints = complete_checkpoints(root / step_name(number) / "checkpoints")
    if step.state == "training" and checkpoints:
        return f"step {number} resumes from its optimizer step {checkpoints[-1].step:,}"
    if number == 1:
        return f"step 1 trains on {step.pairs:,} pairs from its start"
    previous = short_identity(manifest.step(number - 1).snapshot)
    start = "the first model" if manifest.target == "first" else "the same snapshot"
    return (
        f"step {number} trains on {step.pairs:,} pairs; reference: snapshot {previous} of step "
        f"{number - 1}; start: {start}"
    )
