"""Watches over a run from a thread of each process, and ends the process when another is lost.

The main thread of a process whose peer is stopped or cut off waits inside a collective, where no
Python code can interrupt it, for `training.timeout_s`. The thread here notices the loss after
`training.heartbeat_timeout_s`, prints who is lost and ends the process with `EXIT_PEER_LOST`. Files
appear complete or not at all (`storage/atomic.py`), so a process may end at any moment.

It also notices when no process makes progress for almost `training.timeout_s` (`stuck.py`), and
prints the Python stack of each; and when the launcher of this process was killed.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import cast

import psutil
import torch.distributed as dist

from megatron_idpo.errors import EXIT_PEER_LOST, LOST_PEER_NOTE, UserError
from megatron_idpo.machine import boot_id
from megatron_idpo.mcore.watchdog.activity import (
    IdleTimer,
    current_activity,
    current_stage,
    restart,
)
from megatron_idpo.mcore.watchdog.heartbeat import Heartbeat
from megatron_idpo.mcore.watchdog.link import SocketLink, connect, listen, not_own, own_addresses
from megatron_idpo.mcore.watchdog.monitor import (
    ENDED_GRACE_S,
    SILENT_GRACE_S,
    Loss,
    Monitor,
    PeerState,
)
from megatron_idpo.mcore.watchdog.stuck import stuck_loss

logger = logging.getLogger(__name__)

_BEATS_PER_TIMEOUT = 8
"""A heartbeat or two may come late on a busy machine."""

_STUCK_FRACTION = 0.95
"""Of `training.timeout_s`: before the process groups give up, with an error that names less."""

_STUCK_INTERVALS = 3.0
"""Until the states of all processes have reached rank 0, and its decision all processes."""

_PRINT_LIMIT_S = 5.0
"""For the last message: standard error may be a pipe that no process reads, or on a hung NFS; what
it says may be asked of a machine that is lost."""

_MAX_STRANGERS = 256
"""Connections without a token; the oldest is closed. Our own send theirs at once."""

_POLLS_PER_BEAT = 10
"""How often messages are looked for. To wait for them wakes rank 0 of 512 for each of 70 others:
far more work (docs/decisions.md)."""

_REASON_WAIT_S = 2.0
"""For the news of which process has died, after a collective has failed."""

LAUNCHER_PID = "MEGATRON_IDPO_LAUNCHER_PID"
"""Environment: the process that has started this one, if it is `cli/agent.py`'s."""

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
    restart()
    interval_s = heartbeat_timeout_s / _BEATS_PER_TIMEOUT
    idle = IdleTimer(interval_s)
    heartbeat, server, token = _join_tree(Monitor(heartbeat_timeout_s, interval_s), idle)
    watchdog = Watchdog(
        heartbeat, server, token, idle=idle, stuck_s=stuck_after_s(timeout_s, interval_s)
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watchdog.launcher = launcher_pid()
    watchdog.announces = dist.get_backend() == "nccl"
    watchdog.start()
    try:
        yield
    except BaseException as error:
        watchdog.stop(error)
        raise
    watchdog.stop()


def launcher_pid() -> int:
    """The process that started this one, also if it was killed while this one joined."""
    named = os.environ.get(LAUNCHER_PID)
    if named is not None and not psutil.pid_exists(int(named)):
        return int(named)
    return os.getppid()


def stuck_after_s(timeout_s: float, interval_s: float) -> float:
    """Seconds without progress that are reported before collectives give up after `timeout_s`."""
    reporting_s = _STUCK_INTERVALS * interval_s + SILENT_GRACE_S
    return max(timeout_s - max((1 - _STUCK_FRACTION) * timeout_s, reporting_s), timeout_s / 2)


class Watchdog:
    """The thread, and what it does when a process is lost."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        server: socket.socket | None,
        token: str,
        *,
        idle: IdleTimer,
        stuck_s: float,
        end_process: EndProcess = os._exit,
    ) -> None:
        """Args: what `watching` has set up; `end_process` is for tests."""
        self._heartbeat = heartbeat
        self._server = server
        self._token = token
        self._idle = idle
        self.launcher: int | None = None
        """Process that started this one, without which it ends; None: it may end."""

        self.announces = False
        """Whether a loss is printed at once. NCCL may abort a process within a second, before it
        prints one at its own end; gloo raises an error, which names the loss."""

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
            error.add_note(f"{LOST_PEER_NOTE}{self._heartbeat.monitor.loss}")
        self._stopping.set()
        self._thread.join()
        is_user_error = isinstance(error, UserError)
        reason = "" if error is None else type(error).__name__
        self._heartbeat.leave(reason, is_user_error=is_user_error)
        if self._server is not None:
            self._server.close()

    def step(self, now_s: float) -> None:
        """Receive what has arrived, and do what is due at `now_s`."""
        self._idle.tick(now_s)
        self._accept()
        self._heartbeat.receive()
        self._check_launcher()
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
            self._announce(loss)
        if now_s >= self._lost_since_s + loss.grace_s and not self._stopping.is_set():
            end_with(lambda: self.report(loss), self._end_process)

    def _announce(self, loss: Loss) -> None:
        """Print that a process has ended; after other losses NCCL does not abort this one first."""
        if self.announces and loss.grace_s == ENDED_GRACE_S:
            message = f"megatron-idpo: (rank {self._heartbeat.describe().rank}) {loss}"
            # In a thread: printing may block.
            threading.Thread(target=_print, args=(message,), name="announce", daemon=True).start()

    def report(self, loss: Loss) -> str:
        """The message with which this process ends."""
        own = self._heartbeat.describe()
        frame = sys._current_frames().get(self._main_thread)
        if self._idle.idle_s >= self._stuck_s / 2:
            where = f"at:\n{_stack(frame)}"
        else:
            where = f"{_innermost(frame)}; "
        return (
            f"megatron-idpo: error (rank {own.rank}): {loss}. This process was in {own.activity} "
            f"{where}it ends (exit code {EXIT_PEER_LOST}); everything saved so far is complete, "
            "and the same command resumes"
        )

    def _check_progress(self) -> None:
        """Report a process that is stuck. Rank 0 knows the states of all, and decides."""
        interval_s = self._heartbeat.monitor.interval_s
        limit_s = self._stuck_s
        states = self._heartbeat.states()
        if self._heartbeat.parent is not None:
            # For a parent that does not report it.
            limit_s, states = limit_s + _STUCK_INTERVALS * interval_s, states[:1]
        loss = stuck_loss(states, limit_s, margin_s=2 * interval_s)
        if loss is not None:
            self._heartbeat.lose(loss)

    def _check_launcher(self) -> None:
        """End with the launcher: a run that was killed must not keep its GPUs and its lock."""
        if self.launcher is not None and os.getppid() != self.launcher:
            reason = f"its launcher (process {self.launcher}) was killed"
            own, self.launcher = self._heartbeat.describe(), None
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
                strangers = self._heartbeat.strangers
                strangers.append(SocketLink(self._server.accept()[0], self._token))
                if len(strangers) > _MAX_STRANGERS:
                    strangers.pop(0).close()


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


def _join_tree(monitor: Monitor, idle: IdleTimer) -> tuple[Heartbeat, socket.socket | None, str]:
    """Connect this process with its parent. Collective: two all-gathers of a small object."""
    host, rank = socket.gethostname(), dist.get_rank()
    # Two agents of torchrun on one host are two machines; two machines may have one host name.
    machine = f"{os.environ.get('GROUP_RANK', '')}/{host}/{boot_id()}"
    own = _Member(rank, machine, host, secrets.token_hex(16), tuple(own_addresses()))
    members = _gather(own)
    machines = [member.machine for member in members]
    num_children = [parent_rank(machines, child) for child in range(len(machines))].count(rank)
    is_local = len(set(machines)) == 1
    server = listen(num_children, is_local=is_local) if num_children else None
    ports = _gather(0 if server is None else server.getsockname()[1])
    parent, link = parent_rank(machines, rank), None
    if parent is not None:
        addresses: Sequence[str] = members[parent].addresses
        reachable = addresses
        if machines[parent] == machine:
            reachable = ("127.0.0.1",)
        # Two agents on one host have its addresses in common.
        elif machines[parent].partition("/")[2] != machine.partition("/")[2]:
            reachable = not_own(addresses)
        link = connect(reachable, ports[parent], members[0].token)
        if link is None:
            logger.warning(
                "no heartbeats to rank %d: none of %s can be reached at port %d; a lost process "
                "is noticed after training.timeout_s only (GLOO_SOCKET_IFNAME names the network)",
                *(parent, ", ".join(addresses), ports[parent]),
            )

    def describe() -> PeerState:
        activity = current_activity()
        return PeerState(
            rank, host, str(activity), current_stage(), round(idle.idle_s, 1), activity.is_timed
        )

    heartbeat = Heartbeat(
        describe, monitor, link, None if parent is None else PeerState(parent, members[parent].host)
    )
    return heartbeat, server, members[0].token


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


def _stack(frame: FrameType | None) -> str:
    """Without source lines: their files may be on the storage whose hang is the reason."""
    frames = [] if frame is None else [one for one, _ in traceback.walk_stack(frame)]
    return "".join(
        f'  File "{one.f_code.co_filename}", line {one.f_lineno}, in {one.f_code.co_name}\n'
        for one in reversed(frames)
    )


def end_with(
    message: Callable[[], str], end_process: EndProcess, code: int = EXIT_PEER_LOST
) -> None:
    """Print a message and end this process with an exit code, even if printing blocks."""
    with time_limit(_PRINT_LIMIT_S, lambda: end_process(code)):
        _print(message())
        end_process(code)


@contextmanager
def time_limit(limit_s: float, expired: Callable[[], object]) -> Iterator[None]:
    """Call `expired` from another thread if the block, which may hang inside C++, takes longer."""
    timer = threading.Timer(limit_s, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print(message: str) -> None:
    """To stderr, past a progress bar that the main thread may be drawing."""
    with suppress(OSError):
        os.write(2, f"{message}\n".encode())
