"""What this process is doing, for the heartbeats that others read when it has stopped.

    with doing("exporting"):
        ...
    with doing("training step", step=12, is_timed=True):
        ...                # progressed() for each micro-batch

A timed activity consists of short parts, each of which calls `progressed`; without one for
`training.timeout_s` the process is stuck. Other activities may take any time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from megatron_idpo.errors import UserError


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process does from some moment on. Immutable: the heartbeat's thread reads it."""

    name: str
    step: int | None = None
    is_timed: bool = False

    def __str__(self) -> str:
        """`step 12, training step`."""
        return self.name if self.step is None else f"step {self.step}, {self.name}"


_current = Activity("starting")
_progress_s = monotonic()
_stage: tuple[int, int] | None = None


def current_activity() -> Activity:
    """Of this process."""
    return _current


def seconds_without_progress() -> float:
    """Since the activity began or `progressed` was called."""
    return monotonic() - _progress_s


def progressed() -> None:
    """A part of the activity is done. Costs 0.1 microseconds."""
    global _progress_s
    _progress_s = monotonic()


def set_stage(stage: tuple[int, int] | None) -> None:
    """Announce this process's pipeline stage: its index from 0, and the number of stages."""
    global _stage
    _stage = stage


def current_stage() -> tuple[int, int] | None:
    """What `set_stage` has announced."""
    return _stage


@contextmanager
def doing(name: str, *, step: int | None = None, is_timed: bool = False) -> Iterator[None]:
    """Announce what the block does. Nested blocks replace it; their end restores it.

    Args:
        name: as a user reads it: `exporting`, `training step`.
        step: of the optimizer; None keeps that of the enclosing block.
        is_timed: whether the block calls `progressed` at least every `training.timeout_s`.
    """
    global _current
    before = _current
    _current = Activity(name, before.step if step is None else step, is_timed)
    progressed()
    try:
        yield
    except Exception as error:
        # A process that fails keeps its activity, for the report; an error of the user on one rank
        # may be caught.
        if isinstance(error, UserError):
            _current = before
        raise
    _current = before
    progressed()
