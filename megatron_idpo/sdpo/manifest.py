"""The manifest of an sDPO run: the state of each step, in `OUTPUT/manifest.json`.

    pending → training → complete

A step is `training` once its data, start and reference are fixed, and `complete` once its snapshot
has its final name and is recorded here. If a run is killed, the manifest says which steps are
complete; all others are repeated or resumed, with the same result. The file is replaced atomically
and sealed (`storage/sealed.py`): after a changed byte the run stops instead of using another
reference.

Not collective: one rank writes, all read the same file.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_idpo import __version__
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.errors import CheckpointError, Problem
from megatron_idpo.storage.provenance import as_problems, diff
from megatron_idpo.storage.sealed import read_sealed, write_sealed

FILE = "manifest.json"
SNAPSHOTS = "snapshots"
FIRST = "first_model/"
"""Prefix of a step's metrics against the first model."""

_FORMAT = 1
_REMEDY = "restore it, or start again in another training.output"
_KEEP = "keep it, or name another training.output"
_KEEP_PAIRS = (
    "use the data, seed and sdpo.order that the run began with, or name another training.output"
)

State = Literal["pending", "training", "complete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step."""

    state: State = "pending"

    pairs: int
    """Number of its training pairs."""

    data: str
    """Fingerprint of these pairs."""

    sources: dict[str, int]
    """Number of pairs by source."""

    learnt: dict[str, Any]
    """Settings that define what is learned, by `section.field`, and the dtype."""

    start: str | None = None
    """Identity of the model that its policy starts from; None while pending."""

    reference: str | None = None
    """Identity of its reference; None while pending."""

    layout: dict[str, Any] = field(default_factory=dict)
    """Parallel sizes of its last start, for information."""

    snapshot: str | None = None
    """Identity of its result; None until it is complete."""

    snapshot_bytes: int = 0
    is_removed: bool = False
    """Whether the snapshot has been deleted (`sdpo.keep_snapshots`)."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Of its result, on held-out pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole run."""

    model: str
    """Path of the first model, as configured."""

    model_identity: str
    target: str
    adapters: str | None
    """`merge` or `carry`; None in full training."""

    accuracy: dict[str, float]
    """Accuracy of the first model by source: the share of pairs whose chosen answer is the more
    likely one."""

    steps: tuple[StepRecord, ...]
    version: str = __version__

    def step(self, number: int) -> StepRecord:
        """Record of a step, counted from 1."""
        return self.steps[number - 1]

    def with_step(self, number: int, **changes: Any) -> "Manifest":
        """A copy with changes to the record of one step."""
        steps = list(self.steps)
        steps[number - 1] = replace(steps[number - 1], **changes)
        return replace(self, steps=tuple(steps))

    @property
    def complete_steps(self) -> dict[int, StepRecord]:
        """Complete steps by number, in order."""
        numbered = enumerate(self.steps, start=1)
        return {number: step for number, step in numbered if step.state == "complete"}

    @property
    def next_step(self) -> int | None:
        """Number of the first step that is not complete; None if all are."""
        return next((n for n, step in enumerate(self.steps, 1) if step.state != "complete"), None)


def snapshot_directory(root: Path, number: int) -> Path:
    """Directory of a step's snapshot; steps are counted from 1."""
    return root / SNAPSHOTS / step_name(number)


def read_manifest(root: Path) -> Manifest | None:
    """Read the manifest in a run's directory; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or has been changed.
    """
    path = root / FILE
    if not path.exists():
        return None
    values = read_sealed(path, remedy=_REMEDY)
    if values.pop("format", None) != _FORMAT:
        message = f"was written by megatron-idpo {values.get('version')}"
        raise CheckpointError.at(str(path), message, "resume with that version")
    steps = tuple(StepRecord(**step) for step in values.pop("steps"))
    return Manifest(**values, steps=steps)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_sealed(root / FILE, {"format": _FORMAT, **asdict(manifest)})


def merge_manifests(root: Path, saved: Manifest, planned: Manifest) -> Manifest:
    """The saved manifest, with steps that have not begun replaced by the planned ones.

    Args:
        root: the run's directory.
        saved: of an earlier start.
        planned: of the current configuration, all steps pending.

    Raises:
        CheckpointError: with every setting of a begun step that has changed.
    """
    location = str(root / FILE)
    begun = [step for step in saved.steps if step.state != "pending"]
    labels = {"model": f"the first model ({saved.model})"}
    problems = as_problems(diff(_inputs(saved), _inputs(planned), labels), location, _KEEP)
    if len(begun) > len(planned.steps):
        message = f"{len(begun)} steps have begun, but {len(planned.steps)} are configured"
        problems.append(Problem(location, message, _KEEP))
    pairs_of_steps = list(zip(begun, planned.steps, strict=False))
    for number, (before, now) in enumerate(pairs_of_steps, start=1):
        if before.data != now.data:
            message = f"step {number}: pairs differ ({before.pairs:,}, now {now.pairs:,})"
            problems.append(Problem(location, message, _KEEP_PAIRS))
        settings = diff({f"step {number}": before.learnt}, {f"step {number}": now.learnt})
        problems += as_problems(settings, location, _KEEP)
    if problems:
        raise CheckpointError.of(problems)
    # Pairs are compared by content (`data`). The names of their sources may have changed.
    kept = [replace(before, sources=now.sources) for before, now in pairs_of_steps]
    return replace(planned, steps=(*kept, *planned.steps[len(kept) :]))


def _inputs(manifest: Manifest) -> dict[str, Any]:
    """Inputs that all steps share."""
    return {
        "model": manifest.model_identity,
        "sdpo.target": manifest.target,
        "sdpo.adapters": manifest.adapters,
    }
