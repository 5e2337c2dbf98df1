"""The rendezvous of our agent: which machines join, and what they note for each other's workers.

`cli/agent.py` uses it; `mcore/watchdog/launch_notes.py` has the notes.
"""

import itertools
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Any, cast
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousHandler

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED
from megatron_idpo.mcore.watchdog.launch_notes import (
    BEAT_S,
    VARIABLE,
    Launch,
    LaunchEnd,
    beat,
    have_joined,
    report_end,
    usable,
)
from megatron_idpo.mcore.watchdog.monitor import ranges

_STORE_TIMEOUT_S = 60.0

_REPORT_S = 5.0
"""For a report to a store whose machine may be lost; connecting may wait for a name server."""


def announce_launch(worker_group: WorkerGroup, restarts: int) -> "LauncherNotes | None":
    """Pass the launchers' store to the workers, and leave notes there (`launch_notes.py`).

    Args:
        worker_group: of this machine, which has joined the others.
        restarts: of the workers, so far.

    Returns:
        The notes of this launcher; None if this is the only machine, or the store is not a server.
    """
    handler = worker_group.spec.rdzv_handler
    number = cast(int, worker_group.group_world_size)
    settings = getattr(handler, "settings", None)  # none in the static rendezvous
    fewest, most = (settings.min_nodes, settings.max_nodes) if settings else (number, number)
    os.environ.pop(VARIABLE, None)
    if most == 1:
        return None
    store = cast(dist.Store, worker_group.store)  # torch's attributes are typed as None
    # Of the first launcher that comes here.
    start = store.compare_set("megatron_idpo/start", "", uuid4().hex).decode()
    if handler.get_backend() == "static":
        # One store for all starts. In other rendezvous machines that came later have restarted less
        # often, but each round has its prefix.
        start = f"{start}/{restarts}"
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    launch = Launch(store.host, store.port, start, fewest=fewest, most=most)
    launch.to_environment()
    if isinstance(handler, PatientRendezvous):
        handler.started(cast(int, worker_group.group_rank), number, launch.notes_in(store))
    return LauncherNotes(launch, worker_group)


class LauncherNotes:
    """What workers of other machines must know of this one while they wait for its workers."""

    def __init__(self, launch: Launch, worker_group: WorkerGroup) -> None:
        """Start to send beats, from a thread.

        Args:
            launch: the launchers' store.
            worker_group: of this machine.
        """
        self._launch = launch
        self._machine = cast(int, worker_group.group_rank)
        self._host = socket.gethostname()
        self._ranks = [worker.global_rank for worker in worker_group.workers]
        self._end: LaunchEnd | None = None
        self._closing, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def close(self) -> None:
        """Send no more beats."""
        self._closing.set()

    def report_end(self, local_rank: int, exit_code: int, code: int) -> None:
        """A worker has ended: those of other machines need not wait for it.

        Args:
            local_rank: of the worker.
            exit_code: its own; negative for a signal.
            code: of this machine. Others stop as well if it is `EXIT_PREEMPTED`.
        """
        worker = f"rank {self._ranks[local_rank]} (host {self._host})"
        if code == EXIT_PREEMPTED:
            self._end = LaunchEnd(f"{worker} was stopped by a signal", code)
        else:
            reason = f"{worker} has ended with exit code {exit_code}"
            self._end = LaunchEnd(reason, EXIT_PEER_LOST)
        self._closing.set()
        self._closed.wait(_REPORT_S)

    def _beat(self) -> None:
        noun = "ranks" if self._ranks[1:] else "rank"
        name = f"{noun} {ranges(self._ranks)} (host {self._host})"
        with suppress(dist.DistError):  # workers and rendezvous notice the end of its host
            # Not the main thread's connection: a machine that is cut off must end, not wait.
            notes = self._launch.connect(_STORE_TIMEOUT_S)
            for index in itertools.count():
                beat(notes, self._machine, index, name)
                # Without beats, the end of the store's host leaves no warnings of torch in the log.
                if self._closing.wait(BEAT_S) or have_joined(notes):
                    break
            if self._end is not None:
                report_end(notes, self._end)
        self._closed.set()


class PatientRendezvous:
    """A rendezvous that keeps healthy workers running.

    Its host may end before the workers of this machine do: after a stop its agent often ends first.
    torchrun's agent would end its own workers then, and with another code. They end by themselves,
    with 75 or, if the host is lost, with 3.

    A machine with which the number of machines would not fit the run's layout is left waiting, for
    others or for the loss of one.
    """

    def __init__(self, handler: RendezvousHandler) -> None:
        """Args: torchrun's; everything else is left to it."""
        self._handler = handler
        self._is_lost = False
        self._machine, self._machines = 0, 0
        self._notes: dist.Store | None = None
        self._usable: list[int] | None = None
        self._unusable: int | None = None

    def __getattr__(self, name: str) -> Any:
        """Of torchrun's."""
        return getattr(self._handler, name)

    def started(self, machine: int, machines: int, notes: dist.Store) -> None:
        """The workers of this start are about to run.

        Args:
            machine: index of this one.
            machines: how many have joined.
            notes: of the workers (`watchdog/launch_notes.py`).
        """
        self._machine, self._machines, self._notes = machine, machines, notes
        self._usable = self._unusable = None

    def num_nodes_waiting(self) -> int:
        """Machines that want to join and can be used; none if the host has ended."""
        if not self._is_lost:
            try:
                waiting = self._handler.num_nodes_waiting()
                return waiting if waiting and self._can_use(waiting) else 0
            except (RendezvousError, dist.DistError):
                self._is_lost = True
        return 0

    def _can_use(self, waiting: int) -> bool:
        """Whether the run can work on as many machines as a restart would give it."""
        if self._notes is None:
            return True
        if self._usable is None:
            self._usable = usable(self._notes)
        number = min(self._machines + waiting, self.settings.max_nodes)
        if self._usable is None or number in self._usable:
            return True
        if self._machine == 0 and self._unusable != number:
            others = ", ".join(map(str, self._usable))
            print(
                f"node.py: not used: {waiting} that wait to join; {number} machines do not fit "
                f"the run ({others} do), so the run continues on {self._machines}",
                file=sys.stderr,
                flush=True,
            )
        self._unusable = number
        return False
