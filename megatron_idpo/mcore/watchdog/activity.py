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


_FIRST = Activity("starting")
_current = _FIRST
_progress = 0
"""Times that `progressed` was called."""

_stage: tuple[int, int] | None = None


def current_activity() -> Activity:
    """Of this process."""
    return _current


class IdleTimer:
    """How long the main thread has made no progress, counted in ticks of another thread.

    The clock runs on while a process is suspended; what a tick is longer than two intervals was
    slept and does not count.
    """

    def __init__(self, interval_s: float) -> None:
        """Args: time between two ticks."""
        self.idle_s = 0.0
        """Without progress, up to the last tick."""

        self._longest_tick_s = 2 * interval_s
        self._progress = _progress
        self._last_tick_s: float | None = None

    def tick(self, now_s: float) -> None:
        """Count the time since the last tick."""
        elapsed_s = 0.0 if self._last_tick_s is None else now_s - self._last_tick_s
        self._last_tick_s = now_s
        if self._progress != _progress:
            self._progress, self.idle_s = _progress, 0.0
        else:
            self.idle_s += min(elapsed_s, self._longest_tick_s)


def progressed() -> None:
    """The activity has begun, or a part of it is done. Costs 0.1 microseconds."""
    global _progress
    _progress += 1


def restart() -> None:
    """Forget the activity of an earlier run in this process, which may have failed."""
    global _current, _stage
    _current, _stage = _FIRST, None
    progressed()


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
