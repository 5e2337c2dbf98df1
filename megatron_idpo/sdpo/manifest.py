"""What has become of each step, in one file that changes by a rename only: `OUTPUT/manifest.json`.

    pending → training → complete

A step is `training` from when its data, its starting point and its reference are settled, and
`complete` when its snapshot has its name and is listed here. Whenever a run is killed, the manifest
tells which steps are done; everything else is done again, or gone on with, and comes out the same.
Sealed (`sealed.py`), so that a run with a changed byte stops instead of using another reference.

Not collective: one rank writes, all read the same file.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_idpo import __version__
from megatron_idpo.errors import CheckpointError, Problem
from megatron_idpo.storage.sealed import read_sealed, write_sealed

FILE = "manifest.json"
FIRST = "first_model/"
"""Begins the names of a step's figures against the first model."""

_FORMAT = 1
_REMEDY = "put it back as it was, or begin anew in another training.output"
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
    """It learns from."""

    data: str
    """Fingerprint of those pairs."""

    sources: dict[str, int]
    """How many come from where."""

    learnt: dict[str, Any]
    """The sections that say what is learnt, and the weights' format."""

    start: str | None = None
    """Identity of what its policy started from, once it is settled."""

    reference: str | None = None
    """Identity of its reference, likewise."""

    layout: dict[str, Any] = field(default_factory=dict)
    """Parallel sizes of its last start, for people to read."""

    snapshot: str | None = None
    """Identity of its result, once it is complete."""

    snapshot_bytes: int = 0
    is_removed: bool = False
    """Whether the snapshot has been taken away, as `sdpo.keep_snapshots` wants it."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Of its result, on held-out pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole run."""

    model: str
    """The first model's path, as configured."""

    model_identity: str
    target: str
    adapters: str | None
    """`merge` or `carry`; None where all weights are trained."""

    accuracy: dict[str, float]
    """The first model's reward accuracy on each source: the share of pairs whose chosen answer it
    finds more likely."""

    steps: tuple[StepRecord, ...]
    version: str = __version__

    def step(self, number: int) -> StepRecord:
        """A step's record; steps are counted from 1."""
        return self.steps[number - 1]

    def with_step(self, number: int, **changes: Any) -> "Manifest":
        """The same with one step's record changed."""
        steps = list(self.steps)
        steps[number - 1] = replace(steps[number - 1], **changes)
        return replace(self, steps=tuple(steps))

    @property
    def next_step(self) -> int | None:
        """The first step that is not complete; None if all are."""
        open_steps = [n for n, step in enumerate(self.steps, 1) if step.state != "complete"]
        return open_steps[0] if open_steps else None


def read_manifest(root: Path) -> Manifest | None:
    """The manifest in a run's directory; None if there is none.

    Raises:
        CheckpointError: it cannot be read, or has been changed.
    """
    path = root / FILE
    if not path.exists():
        return None
    values = read_sealed(path, remedy=_REMEDY)
    if values.pop("format", None) != _FORMAT:
        message = f"was written by megatron-idpo {values.get('version')}"
        raise CheckpointError.at(str(path), message, "go on with that version")
    steps = tuple(StepRecord(**step) for step in values.pop("steps"))
    return Manifest(**values, steps=steps)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_sealed(root / FILE, {"format": _FORMAT, **asdict(manifest)})


def continued(root: Path, found: Manifest, planned: Manifest) -> Manifest:
    """An earlier run's manifest, with the steps that it has not begun as they are planned now.

    Args:
        root: the run's directory.
        found: what is there.
        planned: this run's, all steps pending.

    Raises:
        CheckpointError: naming all that this run would do otherwise than it has been done.
    """
    location = str(root / FILE)
    problems = [
        Problem(location, f"was begun with {what}", remedy)
        for what, remedy in _differences(found, planned)
    ]
    if problems:
        raise CheckpointError.of(problems)
    begun = [
        replace(step, sources=now.sources)  # the same pairs; their files may have other names
        for step, now in zip(found.steps, planned.steps, strict=False)
        if step.state != "pending"
    ]
    return replace(planned, steps=(*begun, *planned.steps[len(begun) :]))


def _differences(found: Manifest, planned: Manifest) -> list[tuple[str, str]]:
    """What was done otherwise, in words, and what to do about it."""
    message = []
    if found.model_identity != planned.model_identity:
        message.append((f"another first model ({found.model})", _KEEP))
    for name in ("target", "adapters"):
        before, now = getattr(found, name), getattr(planned, name)
        if before != now:
            message.append((f"sdpo.{name} = {before}, not {now}", _KEEP))
    begun = [step for step in found.steps if step.state != "pending"]
    if len(begun) > len(planned.steps):
        message.append((f"{len(found.steps)} steps, of which {len(begun)} are begun", _KEEP))
    for number, (before_step, now_step) in enumerate(
        zip(begun, planned.steps, strict=False), start=1
    ):
        message += _step_differences(number, before_step, now_step)
    return message


def _step_differences(
    number: int, before: StepRecord, now: StepRecord
) -> Sequence[tuple[str, str]]:
    message = []
    if before.data != now.data:
        what = f"other pairs in step {number} ({before.pairs:,}, now {now.pairs:,})"
        message.append((what, _KEEP_PAIRS))
    for name in sorted({*before.learnt, *now.learnt}):
        if before.learnt.get(name) != now.learnt.get(name):
            was, wanted = before.learnt.get(name), now.learnt.get(name)
            message.append((f"{name} = {was} in step {number}, not {wanted}", _KEEP))
    return message
