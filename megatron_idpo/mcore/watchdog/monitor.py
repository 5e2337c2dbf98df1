"""Decides from heartbeats which process is lost. Without sockets, threads or a clock.

The processes form a tree: rank 0, below it the first rank of each machine, below those the other
ranks of the machine. Each exchanges heartbeats with its parent and its children only. A heartbeat
to the parent describes the sender and everything below it, so that the loss of a machine names all
of its ranks.

Silence is counted in ticks of this process: after it was suspended itself (a stopped process, a
paused virtual machine), the time that it slept does not count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

ENDED_GRACE_S = 10.0
"""For the own error of a process whose peer has ended: usually the same error, or a better one."""

USER_ERROR_GRACE_S = 120.0
"""After an error of the user, which all processes raise: rank 0 still uploads logs and deletes an
incomplete export. Shorter than `training.timeout_s`, if it was raised on one process only."""

SILENT_GRACE_S = 3.0
"""For passing the loss on before this process ends."""

_TICK_INTERVALS = 2.0
"""A longer tick was spent asleep."""


@dataclass(frozen=True, slots=True)
class PeerState:
    """A process as its last heartbeat described it."""

    rank: int
    host: str
    activity: str = "starting"
    stage: tuple[int, int] | None = None
    """Pipeline stage from 0, and number of stages."""

    idle_s: float = 0.0
    """Without progress of the main thread."""

    is_timed: bool = False
    """Whether the activity makes progress all the time (`activity.py`)."""

    def __str__(self) -> str:
        """`rank 3 (host b, pipeline stage 2 of 2)`."""
        stage = "" if self.stage is None else f", pipeline stage {self.stage[0] + 1} of "
        return f"rank {self.rank} (host {self.host}{stage}{self.stage[1] if self.stage else ''})"

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From the fields in a message."""
        stage = values.pop("stage", None)
        return cls(**values, stage=None if stage is None else (stage[0], stage[1]))


@dataclass(frozen=True, slots=True)
class Loss:
    """A process that is lost, with those that only it can reach."""

    peer: PeerState | None
    """None: which one is not known."""

    reason: str
    """What is known: `no heartbeat for 41 s`."""

    others: tuple[int, ...] = ()
    """Ranks below it in the tree, which are out of reach with it."""

    grace_s: float = SILENT_GRACE_S
    """Until this process ends as well."""

    def __str__(self) -> str:
        """One sentence without its period."""
        if self.peer is None:
            return self.reason
        message = f"{self.peer} is lost: {self.reason}; its last message: {self.peer.activity}"
        if self.others:
            message += f" (ranks {ranges(self.others)} can be reached only through it)"
        return message

    def message(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From a message."""
        peer = values["peer"]
        values["peer"] = None if peer is None else PeerState.of(peer)
        return cls(**{**values, "others": tuple(values["others"])})


@dataclass(slots=True)
class _Neighbor:
    state: PeerState
    below: tuple[PeerState, ...] = ()
    silent_s: float = 0.0


@dataclass(slots=True)
class Monitor:
    """The neighbors of this process in the tree, and the first loss."""

    timeout_s: float
    """Silence after which a neighbor is lost."""

    interval_s: float
    """Between two ticks, and between two heartbeats of a neighbor."""

    loss: Loss | None = None
    _neighbors: dict[int, _Neighbor] = field(default_factory=dict)
    _last_tick_s: float | None = None

    def heard(self, states: Sequence[PeerState]) -> None:
        """A heartbeat: the sender's state, then those of the processes below it."""
        sender, *below = states
        self._neighbors[sender.rank] = _Neighbor(sender, tuple(below))

    def left(self, rank: int) -> None:
        """A neighbor has finished its work: its silence is not a loss."""
        self._neighbors.pop(rank, None)

    def ended(self, rank: int, reason: str, grace_s: float = ENDED_GRACE_S) -> None:
        """A neighbor has ended without finishing its work."""
        neighbor = self._neighbors.pop(rank, None)
        if neighbor is not None:
            self._lose(neighbor, reason, grace_s)

    def reported(self, loss: Loss) -> bool:
        """A neighbor reports a loss; whether it is the first one that this process learns of."""
        is_first = self.loss is None
        self.loss = self.loss or loss
        return is_first

    def tick(self, now_s: float) -> None:
        """Count silence, after everything that has arrived was passed to `heard`."""
        last_s = now_s if self._last_tick_s is None else self._last_tick_s
        self._last_tick_s = now_s
        elapsed_s = min(now_s - last_s, _TICK_INTERVALS * self.interval_s)
        for rank, neighbor in list(self._neighbors.items()):
            neighbor.silent_s += elapsed_s
            if neighbor.silent_s >= self.timeout_s:
                del self._neighbors[rank]
                reason = f"no heartbeat for {neighbor.silent_s:.0f} s (stopped, a library holds "
                reason += "its GIL, or its network or machine is down)"
                self._lose(neighbor, reason, SILENT_GRACE_S)

    def states(self) -> list[PeerState]:
        """Of all processes that this one knows, with the time since they were sent."""
        return [
            replace(state, idle_s=state.idle_s + neighbor.silent_s)
            for neighbor in self._neighbors.values()
            for state in (neighbor.state, *neighbor.below)
        ]

    def below(self, child_ranks: Iterable[int]) -> list[PeerState]:
        """States of the children and of everything below them, for the parent."""
        known = [self._neighbors[rank] for rank in child_ranks if rank in self._neighbors]
        return [state for neighbor in known for state in (neighbor.state, *neighbor.below)]

    def _lose(self, neighbor: _Neighbor, reason: str, grace_s: float) -> None:
        others = tuple(state.rank for state in neighbor.below)
        self.reported(Loss(neighbor.state, reason, others, grace_s))


def ranges(ranks: Sequence[int]) -> str:
    """Ranks as text: `1-3, 5`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}-{part[-1]}" if part[1:] else str(part[0]) for part in parts)
