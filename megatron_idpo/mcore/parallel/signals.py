"""Signals that ask a run to stop: remembered, and heeded at the end of a step.

A scheduler that takes a machine away sends SIGTERM or SIGUSR1 first. Ranks hear of it at different
moments, so nobody acts alone: the wish travels with a step's metrics, and all ranks stop together.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.signal: signal.Signals | None = None

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """Remember a signal; usable as its handler."""
        self.signal = signal.Signals(number)

    @property
    def is_there(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None


class Stopped(Exception):
    """Work that was asked to stop has stopped, on every rank, and saved what was done."""


@contextmanager
def listening() -> Iterator[StopFlag]:
    """Remember stopping signals instead of dying of them, until the end of the block."""
    stop_flag = StopFlag()
    before = {number: signal.signal(number, stop_flag.hear) for number in STOPPING}
    try:
        yield stop_flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
