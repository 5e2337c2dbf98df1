"""Watches over a run from a thread of each process, and ends the process when another is lost.

The main thread of a process whose peer is stopped or cut off waits inside a collective, where no
Python code can interrupt it, for `training.timeout_s`. The thread here notices the loss after
`training.heartbeat_timeout_s`, prints who is lost and ends the process with `EXIT_PEER_LOST`. Files
appear complete or not at all (`storage/atomic.py`), so a process may end at any moment.

It also notices when the main thread itself makes no progress for `training.timeout_s`, and prints
its Python stack.

Heartbeats need the GIL once per interval. A library that holds it for longer than
`training.heartbeat_timeout_s` counts as lost.
"""

import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import cast

import torch.distributed as dist

from megatron_idpo.errors import EXIT_PEER_LOST, UserError
from megatron_idpo.mcore.watchdog.activity import (
    current_activity,
    current_stage,
    seconds_without_progress,
)
from megatron_idpo.mcore.watchdog.heartbeat import Heartbeat
from megatron_idpo.mcore.watchdog.link import SocketLink, connect, listen, own_addresses
from megatron_idpo.mcore.watchdog.monitor import SILENT_GRACE_S, Loss, Monitor, PeerState

logger = logging.getLogger(__name__)

_BEATS_PER_TIMEOUT = 8
"""A heartbeat or two may come late on a busy machine."""

_STUCK_FRACTION = 0.95
"""Of `training.timeout_s`: before the process groups give up, with an error that names less."""

_POLLS_PER_BEAT = 10
"""How often messages are looked for. To wait for them wakes rank 0 of 512 for each of 70 others:
far more work (docs/decisions.md)."""

_REASON_WAIT_S = 2.0
"""For the news of which process has died, after a collective has failed."""

type EndProcess = Callable[[int], object]


@contextmanager
def watching(timeout_s: float, heartbeat_timeout_s: float) -> Iterator[None]:
    """Exchange heartbeats with the other processes within the block. Collective at its begin.

    Nothing happens in a world of one process, or if `heartbeat_timeout_s` is 0.

    Args:
        timeout_s: after which the main thread is stuck, if its activity is timed.
        heartbeat_timeout_s: silence after which a process is lost.
    """
    if dist.get_world_size() == 1 or heartbeat_timeout_s == 0:
        yield
        return
    interval_s = heartbeat_timeout_s / _BEATS_PER_TIMEOUT
    heartbeat, server = _join_tree(Monitor(heartbeat_timeout_s, interval_s))
    watchdog = Watchdog(heartbeat, server, stuck_s=_STUCK_FRACTION * timeout_s)
    watchdog.start()
    try:
        yield
    except BaseException as error:
        watchdog.stop(error)
        raise
    watchdog.stop()


class Watchdog:
    """The thread, and what it does when a process is lost."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        server: socket.socket | None,
        *,
        stuck_s: float,
        end_process: EndProcess = os._exit,
    ) -> None:
        """Args: what `watching` has set up; `end_process` is for tests."""
        self._heartbeat = heartbeat
        self._server = server
        self._stuck_s = stuck_s
        self._end_process = end_process
        self._next_beat_s = 0.0
        self._lost_since_s: float | None = None
        self._main_thread = threading.get_ident()
        self._stopping = threading.Event()
        self._knows_loss = threading.Event()
        self._poll_s = heartbeat.monitor.interval_s / _POLLS_PER_BEAT
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """End the thread; called by the main thread at its end.

        Args:
            error: that the main thread ends with. If a collective has failed, the error gets a note
                that names the lost process.
        """
        is_collective = isinstance(error, RuntimeError) and not isinstance(error, UserError)
        if is_collective and self._knows_loss.wait(_REASON_WAIT_S) and error is not None:
            error.add_note(str(self._heartbeat.monitor.loss))
        self._stopping.set()
        self._thread.join()
        self._heartbeat.leave("" if error is None else type(error).__name__)
        if self._server is not None:
            self._server.close()

    def step(self, now_s: float) -> None:
        """Receive what has arrived, and do what is due at `now_s`."""
        self._accept()
        self._heartbeat.receive()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + self._heartbeat.monitor.interval_s
            self._check_progress()
            self._heartbeat.beat(now_s)
        loss = self._heartbeat.monitor.loss
        if loss is None:
            return
        if self._lost_since_s is None:
            self._lost_since_s = now_s
            self._knows_loss.set()
        if now_s >= self._lost_since_s + loss.grace_s and not self._stopping.is_set():
            _print(self.report(loss))
            self._end_process(EXIT_PEER_LOST)

    def report(self, loss: Loss) -> str:
        """The message with which this process ends."""
        own = self._heartbeat.describe()
        frame = sys._current_frames().get(self._main_thread)
        if seconds_without_progress() >= self._stuck_s / 2 and current_activity().is_timed:
            where = "at:\n" + "".join(traceback.format_stack(frame))
        else:
            where = f"{_innermost(frame)}; "
        return (
            f"megatron-idpo: error (rank {own.rank}): {loss}. This process was in {own.activity} "
            f"{where}it ends (exit code {EXIT_PEER_LOST}); everything saved so far is complete, "
            "and the same command resumes"
        )

    def _check_progress(self) -> None:
        """Report this process as lost if its main thread is stuck."""
        silent_s = seconds_without_progress()
        if current_activity().is_timed and silent_s >= self._stuck_s:
            reason = f"no progress for {silent_s:.0f} s (training.timeout_s)"
            own = self._heartbeat.describe()
            self._heartbeat.lose(Loss(own, reason, grace_s=SILENT_GRACE_S))

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._poll_s):
                self.step(time.monotonic())
        except Exception:
            # The others would take this process for dead. They lose only what a watchdog adds.
            logger.exception("heartbeats of this process have stopped")
            self._heartbeat.leave()

    def _accept(self) -> None:
        """Accept the children that have connected."""
        with suppress(OSError):  # none is waiting, or one has gone
            while self._server is not None:
                self._heartbeat.strangers.append(SocketLink(self._server.accept()[0]))


# ---- setting up ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    """What a process announces to all others before the heartbeats start."""

    rank: int
    machine: str
    host: str
    token: str
    addresses: tuple[str, ...]


def parent_rank(machines: list[str], rank: int) -> int | None:
    """The parent in the tree: the first rank of the machine, or rank 0, which has None.

    Args:
        machines: by rank; equal for the ranks of one machine.
        rank: of the child.
    """
    first = machines.index(machines[rank])
    if rank != first:
        return first
    return 0 if rank else None


def _join_tree(monitor: Monitor) -> tuple[Heartbeat, socket.socket | None]:
    """Connect this process with its parent. Collective: two all-gathers of a small object."""
    host, rank = socket.gethostname(), dist.get_rank()
    # Two agents of torchrun on one host are two machines.
    machine = f"{os.environ.get('GROUP_RANK', '')}/{host}"
    own = _Member(rank, machine, host, secrets.token_hex(16), tuple(own_addresses()))
    members = _gather(own)
    machines = [member.machine for member in members]
    num_children = [parent_rank(machines, child) for child in range(len(machines))].count(rank)
    is_local = len(set(machines)) == 1
    server = listen(num_children, is_local=is_local) if num_children else None
    ports = _gather(0 if server is None else server.getsockname()[1])
    parent, link = parent_rank(machines, rank), None
    if parent is not None:
        is_same_machine = machines[parent] == machine
        addresses = ("127.0.0.1",) if is_same_machine else members[parent].addresses
        link = connect(addresses, ports[parent])
        if link is None:
            logger.warning(
                "no heartbeats to rank %d: none of %s can be reached at port %d; a lost process "
                "is noticed after training.timeout_s only (GLOO_SOCKET_IFNAME names the network)",
                *(parent, ", ".join(addresses), ports[parent]),
            )
    heartbeat = Heartbeat(
        lambda: PeerState(rank, host, str(current_activity()), current_stage()),
        members[0].token,
        monitor,
        link,
        None if parent is None else PeerState(parent, members[parent].host),
    )
    return heartbeat, server


def _gather[Value](value: Value) -> list[Value]:
    values: list[Value | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast(list[Value], values)


# ---- reporting -------------------------------------------------------------------------------


def _innermost(frame: FrameType | None) -> str:
    """Where the main thread is: `(all_reduce, distributed_c10d.py:3125)`."""
    if frame is None:
        return ""
    code = frame.f_code
    return f"({code.co_name}, {os.path.basename(code.co_filename)}:{frame.f_lineno})"


def _print(message: str) -> None:
    """To stderr, past a progress bar that the main thread may be drawing."""
    with suppress(OSError):
        os.write(2, f"{message}\n".encode())
