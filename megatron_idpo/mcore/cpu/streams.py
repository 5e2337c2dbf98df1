"""CUDA's streams and events on a CPU: everything has happened when the call returns.

Stand-ins for `torch.cuda.Stream`, `torch.cuda.Event` and the functions around them, which
`megatron_idpo.mcore.cpu.redirect` puts in their place. A CPU executes in program order, so waiting,
recording and synchronising have nothing to do. They do not overlap anything, and elapsed times
are wall-clock times between two records.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch


class Event:
    """A point in the program's order, which on a CPU is always past."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """An event; torch's options (`enable_timing`, ...) change nothing."""
        self._recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        """Remember the time; everything before this line is complete."""
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return: the event is past."""

    def synchronize(self) -> None:
        """Return: the event is past."""

    def query(self) -> bool:
        """True: the event is past."""
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event's record to `end_event`'s."""
        return (end_event._recorded_s - self._recorded_s) * 1e3


class Stream:
    """A queue whose work is done as soon as it is queued."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        """A stream of the CPU, whatever `device` says."""
        self.device = torch.device("cpu")
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority, which are one."""
        return (0, 0)

    def wait_stream(self, stream: Any) -> None:
        """Return: the other stream has nothing outstanding."""

    def wait_event(self, event: Any) -> None:
        """Return: the event is past."""

    def synchronize(self) -> None:
        """Return: nothing is outstanding."""

    def query(self) -> bool:
        """True: nothing is outstanding."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Self:
        """A stream is its own context, as torch's are."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Nothing to leave."""


_THE_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    """The one stream of a CPU; always the same object, so that comparisons hold."""
    return _THE_STREAM


def stream(selected: Any) -> AbstractContextManager[Any]:
    """Run the block's work where it stands; `selected` changes nothing."""
    return nullcontext(selected)
