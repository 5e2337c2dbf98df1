"""Notes that launchers and workers leave for each other, in the store of the launchers.

torchrun passes nothing from the workers to their launcher but exit codes. Launchers join over a
store. The workers of one start join over the same one (rendezvous of a fixed number of machines),
or over another; an environment variable names that of the launchers.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Self

import torch.distributed as dist

from megatron_idpo.errors import EXIT_PEER_LOST

VARIABLE = "MEGATRON_IDPO_LAUNCH"
"""`Launch` as JSON; set by `cli/agent.py`."""

_PREFIX = "megatron_idpo/launch"
_USABLE = "usable"
_END = "end"
_JOINED = "joined"

BEAT_S = 2.0
"""Between two beats of a launcher, and between two looks at them."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The store of a run's launchers, and how many machines it may have."""

    host: str
    port: int
    start: str
    """Identifies this start of the workers; the store keeps the notes of earlier ones."""

    fewest: int
    most: int
    """As `--nnodes fewest:most` says; equal if the number is fixed."""

    @classmethod
    def from_environment(cls) -> Self | None:
        """As the launcher of this process says; None: it is plain torchrun, or there is none."""
        text = os.environ.get(VARIABLE)
        return None if text is None else cls(**json.loads(text))

    def to_environment(self) -> None:
        """For the workers that this process starts from now on."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    def connect(self, timeout_s: float) -> dist.Store:
        """The notes of this start, by a connection for the caller alone.

        Raises:
            DistError: the launchers' store does not answer.
        """
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        return self.notes_in(store)

    def notes_in(self, store: dist.Store) -> dist.Store:
        """The notes of this start in a store that is connected already."""
        return dist.PrefixStore(f"{_PREFIX}/{self.start}", store)


def set_usable(notes: dist.Store, numbers: Sequence[int]) -> None:
    """Record with which numbers of machines the run can work."""
    notes.set(_USABLE, json.dumps(list(numbers)))


def usable(notes: dist.Store) -> list[int] | None:
    """What the workers have recorded; None: nothing yet."""
    return json.loads(notes.get(_USABLE)) if notes.check([_USABLE]) else None


@dataclass(frozen=True, slots=True)
class LaunchEnd:
    """Why a start of the workers cannot succeed."""

    reason: str
    """`rank 1 (host node-b) has ended with exit code 137`."""

    code: int
    """With which the workers that wait for others end."""


def report_end(notes: dist.Store, end: LaunchEnd) -> LaunchEnd:
    """Record the end of a start; returns what was recorded first."""
    text = notes.compare_set(_END, "", json.dumps(asdict(end)))
    return LaunchEnd(**json.loads(text))


def beat(notes: dist.Store, machine: int, index: int, name: str) -> None:
    """Record that a launcher lives: its machine, how often it has, and what it is called."""
    notes.set(f"beat/{machine}", f"{index} {name}")


def set_joined(notes: dist.Store) -> None:
    """Record that all workers have joined: no notes are needed any more."""
    notes.set(_JOINED, "")


def have_joined(notes: dist.Store) -> bool:
    """Whether all workers have joined."""
    return notes.check([_JOINED])


class NeighborWatch:
    """Looks for the end of a start, and for beats of the next machine. Without a thread or a clock.

    Each machine watches one other: as long as any machine is left, the one before a lost machine is
    too, or is lost itself. Silence is counted in looks of this process, as in `monitor.py`.
    """

    def __init__(self, notes: dist.Store, machine: int, timeout_s: float) -> None:
        """Args: the start's notes; the neighbor's index; silence after which it is lost."""
        self._notes = notes
        self._key = f"beat/{machine}"
        self._timeout_s = timeout_s
        self._beat = b""
        self._silent_s = 0.0
        self._last_s: float | None = None

    def look(self, now_s: float) -> LaunchEnd | None:
        """The end of the start, if any.

        Raises:
            DistError: the store does not answer.
        """
        if self._notes.check([_END]):
            return LaunchEnd(**json.loads(self._notes.get(_END)))
        elapsed_s = 0.0 if self._last_s is None else min(now_s - self._last_s, 2 * BEAT_S)
        self._last_s = now_s
        # A launcher that has never sent one is another program: silence says nothing.
        last = self._notes.get(self._key) if self._notes.check([self._key]) else b""
        self._silent_s = self._silent_s + elapsed_s if last == self._beat and last else 0.0
        self._beat = last
        if self._silent_s < self._timeout_s:
            return None
        name = last.decode().split(" ", 1)[1]
        reason = f"the launcher of {name} is silent for {self._silent_s:.0f} s (stopped, or its "
        return report_end(
            self._notes, LaunchEnd(f"{reason}network or machine is down)", EXIT_PEER_LOST)
        )
