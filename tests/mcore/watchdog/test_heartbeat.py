"""Heartbeats in a tree of processes: who is named, by whom and when. Without sockets and sleeping.

A `Run` has a `Heartbeat` for each process and a clock that the test moves. A stopped process no
longer beats and reads nothing; a dead one closes its connections; a cut cable loses messages.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from megatron_idpo.mcore.watchdog.heartbeat import Heartbeat
from megatron_idpo.mcore.watchdog.link import Message
from megatron_idpo.mcore.watchdog.monitor import Loss, Monitor, PeerState
from megatron_idpo.mcore.watchdog.watch import parent_rank

TIMEOUT_S, INTERVAL_S = 40.0, 5.0


@dataclass(eq=False)
class MemoryLink:
    """One end of a connection in memory."""

    arrived: list[Message] = field(default_factory=list)
    is_closed: bool = False
    is_cut: bool = False
    other: Any = None

    def send(self, message: Message) -> None:
        if not self.is_cut:
            self.other.arrived.append(message)

    def receive(self) -> list[Message]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def close(self) -> None:
        if not self.is_cut:
            self.other.is_closed = True


def connected() -> tuple[MemoryLink, MemoryLink]:
    first, second = MemoryLink(), MemoryLink()
    first.other, second.other = second, first
    return first, second


class Run:
    """Processes on machines `a`, `b`, ... that have exchanged their first heartbeats."""

    def __init__(self, machines: str) -> None:
        """Args: the machine of each rank, as `aabb`."""
        self.now_s = 0.0
        self.machines = machines
        self.activities = ["step 7, training step"] * len(machines)
        self.stopped: set[int] = set()
        self.lost_at_s: dict[int, float] = {}
        self.processes: list[Heartbeat] = []
        for rank, machine in enumerate(machines):
            parent = parent_rank(list(machines), rank)
            link = None
            if parent is not None:
                link, accepted = connected()
                self.processes[parent].strangers.append(accepted)
            self.processes.append(
                Heartbeat(
                    lambda rank=rank: self.state(rank),
                    Monitor(TIMEOUT_S, INTERVAL_S),
                    link,
                    None if parent is None else PeerState(parent, machines[parent]),
                )
            )
            assert machine
        self.advance(2 * INTERVAL_S)

    def state(self, rank: int) -> PeerState:
        return PeerState(rank, self.machines[rank], self.activities[rank], (rank % 2, 2))

    def advance(self, seconds: float) -> None:
        """Let every process that is not stopped read and beat in each interval."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += INTERVAL_S
            self.exchange()
            for rank, process in enumerate(self.processes):
                if rank not in self.stopped:
                    process.beat(self.now_s)
            self.exchange()
            for rank, process in enumerate(self.processes):
                if process.monitor.loss is not None:
                    self.lost_at_s.setdefault(rank, self.now_s)

    def exchange(self) -> None:
        """Until everything sent has arrived: a loss crosses the tree within one interval."""
        for _ in range(4):
            for rank, process in enumerate(self.processes):
                if rank not in self.stopped:
                    process.receive()

    def die(self, *ranks: int) -> None:
        for rank in ranks:
            self.stopped.add(rank)
            for link in self.processes[rank].links():
                link.close()

    def cut(self, *ranks: int) -> None:
        """Cut the connections between these ranks and the others."""
        for rank, process in enumerate(self.processes):
            for link in process.links():
                child = next((r for r, at in process.children.items() if at is link), None)
                other = parent_rank(list(self.machines), rank) if child is None else child
                if (rank in ranks) != (other in ranks):
                    link.is_cut = True

    def losses(self) -> dict[int, str]:
        """What each process reports; nothing of those that are stopped."""
        return {
            rank: str(process.monitor.loss)
            for rank, process in enumerate(self.processes)
            if rank not in self.stopped and process.monitor.loss is not None
        }


def test_processes_that_beat_lose_nobody():
    run = Run("aabb")
    run.advance(1000.0)
    assert run.losses() == {}


@pytest.mark.parametrize("stopped", [0, 1, 2, 3])
def test_a_stopped_process_is_named_by_every_other_one_in_time(stopped):
    """Whether it is the root, a leader of a machine or another rank."""
    run = Run("aabb")
    run.activities[stopped] = "step 8, saving"
    run.advance(INTERVAL_S)
    stopped_at_s = run.now_s
    run.stopped.add(stopped)
    run.advance(TIMEOUT_S + 2 * INTERVAL_S)
    losses = run.losses()
    assert sorted(losses) == [rank for rank in range(4) if rank != stopped]
    machine = "aabb"[stopped]
    for loss in losses.values():
        assert f"rank {stopped} (host {machine}, pipeline stage {stopped % 2 + 1} of 2)" in loss
        assert "no heartbeat for 4" in loss and "step 8, saving" in loss
    assert max(run.lost_at_s.values()) - stopped_at_s <= TIMEOUT_S + INTERVAL_S


def test_a_cut_cable_is_noticed_on_both_sides_with_the_ranks_behind_it():
    run = Run("aabbb")
    run.cut(2, 3, 4)
    run.advance(TIMEOUT_S + 2 * INTERVAL_S)
    losses = run.losses()
    assert sorted(losses) == [0, 1, 2, 3, 4]
    assert all("rank 2 (host b" in losses[rank] for rank in (0, 1))
    assert all("ranks 3-4 can be reached only through it" in losses[rank] for rank in (0, 1))
    assert all("rank 0 (host a" in losses[rank] for rank in (2, 3, 4))


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_dead_process_is_named_at_once(dead):
    run = Run("aab")
    run.die(dead)
    run.advance(INTERVAL_S)
    losses = run.losses()
    assert sorted(losses) == [rank for rank in range(3) if rank != dead]
    assert all(
        "its process has ended" in loss and f"rank {dead} " in loss for loss in losses.values()
    )


def test_a_process_that_finishes_first_is_not_lost():
    run = Run("aabb")
    for rank in (0, 3, 2):
        run.processes[rank].leave()
        run.stopped.add(rank)
    run.advance(10 * TIMEOUT_S)
    assert run.losses() == {}


def test_a_process_that_ends_with_an_error_is_named_with_it():
    run = Run("aabb")
    run.processes[3].leave("ZeroDivisionError")
    run.stopped.add(3)
    run.advance(INTERVAL_S)
    losses = run.losses()
    assert sorted(losses) == [0, 1, 2]
    assert all(
        "rank 3 " in loss and "ended with ZeroDivisionError" in loss for loss in losses.values()
    )


def test_a_process_that_was_suspended_itself_loses_nobody():
    """All machines of a paused cluster wake up at once: the clock jumps, messages are missing."""
    run = Run("aabb")
    run.now_s += 3600.0
    for process in run.processes:
        process.beat(run.now_s)  # before anything arrives
    run.advance(TIMEOUT_S)
    assert run.losses() == {}


def test_a_late_heartbeat_starts_the_silence_anew():
    run = Run("ab")
    for _ in range(5):
        run.stopped.add(1)
        run.advance(TIMEOUT_S - 2 * INTERVAL_S)
        run.stopped.remove(1)
        run.advance(INTERVAL_S)
    assert run.losses() == {}


def test_strangers_are_disconnected():
    run = Run("ab")
    link, accepted = connected()
    run.processes[0].strangers.append(accepted)
    loss = Loss(PeerState(1, "b"), "made up")
    link.send({"kind": "loss", "loss": loss.message()})
    run.exchange()
    assert run.losses() == {} and link.is_closed


@pytest.mark.parametrize("ends", [True, False])
def test_another_program_at_the_address_of_the_parent_is_not_lost(ends, caplog):
    """It accepts the connection, and then says nothing or ends."""
    link, accepted = connected()
    own = PeerState(1, "b")
    process = Heartbeat(
        lambda: own, Monitor(TIMEOUT_S, INTERVAL_S), link, PeerState(0, "a", "training")
    )
    if ends:
        accepted.close()
    for tick in range(30):
        process.receive()
        process.beat(tick * INTERVAL_S)
    assert process.monitor.loss is None and process.parent is None
    (record,) = caplog.records
    assert "no heartbeats to rank 0 (host a): what answers" in record.getMessage()


def test_a_parent_that_fails_before_its_first_heartbeat_is_lost():
    link, accepted = connected()
    own = PeerState(1, "b")
    process = Heartbeat(lambda: own, Monitor(TIMEOUT_S, INTERVAL_S), link, PeerState(0, "a"))
    parent = Heartbeat(lambda: PeerState(0, "a"), Monitor(TIMEOUT_S, INTERVAL_S))
    parent.strangers.append(accepted)
    parent.leave("ZeroDivisionError")
    process.receive()
    assert "rank 0 (host a) is lost: it ended with ZeroDivisionError" in str(process.monitor.loss)


@pytest.mark.parametrize("wrong", [{"kind": "bye"}, {"kind": "beat", "states": [{}]}])
def test_a_wrong_message_costs_its_connection_and_not_the_heartbeats(wrong):
    """As of a process with another version of the package; the rest of the tree is watched."""
    run = Run("aabb")
    run.processes[1].parent.send(wrong)
    run.advance(2 * TIMEOUT_S)
    assert run.losses() == {}
    assert run.processes[1].parent is None and 1 not in run.processes[0].children
    run.die(3)
    run.advance(INTERVAL_S)
    assert "rank 3 " in run.losses()[0]


def test_an_error_of_the_user_leaves_time_to_clean_up():
    """All processes raise it; rank 0 finishes its loggers while the others have ended."""
    run = Run("ab")
    run.processes[1].leave("ConfigError", is_user_error=True)
    run.stopped.add(1)
    run.advance(INTERVAL_S)
    assert run.processes[0].monitor.loss.grace_s >= 60.0


def test_512_ranks_are_at_most_70_connections_to_one_process():
    machines = [f"node{rank // 8}" for rank in range(512)]
    parents = [parent_rank(machines, rank) for rank in range(512)]
    children = [parents.count(rank) for rank in range(512)]
    assert max(children) == children[0] == 63 + 7
    assert sum(children) == 511 and parents[0] is None
    assert all(parent < child for child, parent in enumerate(parents) if parent is not None)


def test_no_loss_is_reported_before_the_timeout():
    run = Run("ab")
    run.stopped.add(1)
    before = run.now_s
    run.advance(TIMEOUT_S + INTERVAL_S)
    assert run.lost_at_s[0] - before >= TIMEOUT_S - INTERVAL_S
    assert all(later >= earlier for earlier, later in pairwise(sorted(run.lost_at_s.values())))
