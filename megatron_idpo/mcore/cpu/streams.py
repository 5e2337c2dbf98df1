"""CUDA streams and events on a CPU: work is complete when the call that starts it returns.

Replacements for `torch.cuda.Stream`, `torch.cuda.Event` and related functions, installed by
`megatron_idpo.mcore.cpu.redirect`. A CPU executes in program order, so waiting and synchronizing do
nothing, and nothing overlaps. Elapsed times are wall-clock times between two records.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch


class Event:
    """A `torch.cuda.Event`; on a CPU it is always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore torch's options (`enable_timing`, ...)."""
        self._recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        """Record the time."""
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """True."""
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event's record to `end_event`'s."""
        return (end_event._recorded_s - self._recorded_s) * 1e3


class Stream:
    """A `torch.cuda.Stream`; on a CPU there is never outstanding work."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        """Accept torch's arguments; the device is always the CPU."""
        self.device = torch.device("cpu")
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority: both 0."""
        return (0, 0)

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """True."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Self:
        """A stream is its own context manager, like torch's."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Do nothing."""


_CPU_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    """The CPU's only stream; always the same object, because megatron-core compares streams."""
    return _CPU_STREAM


def stream(selected: Any) -> AbstractContextManager[Any]:
    """Run the block in program order; `selected` has no effect."""
    return nullcontext(selected)
