"""Limits the time in which the processes of a run join, before they exchange heartbeats.

A process whose peer dies while it starts waits for it in torch's rendezvous, inside C++, for
`training.timeout_s`. A process that still imports torch can report nothing itself. The launcher of
its machine can, if it is ours (`cli/agent.py`): that a worker has ended, and that the machine lives
(`launch_notes.py`). A limit of time remains for what launchers cannot see, and for plain torchrun;
at its end each process reports who is missing.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Self

import torch.distributed as dist

from megatron_idpo.errors import EXIT_PEER_LOST
from megatron_idpo.mcore.watchdog.launch_notes import (
    BEAT_S,
    Launch,
    LaunchEnd,
    NeighborWatch,
    set_joined,
)
from megatron_idpo.mcore.watchdog.monitor import ranges
from megatron_idpo.mcore.watchdog.watch import EndProcess, end_with, time_limit

_TIMEOUTS_TO_START = 10
"""In heartbeat timeouts: reading torch from cold shared storage takes minutes longer on one machine
than on another."""

_JOINED_S = 60.0

_LOOK_UP_S = 3.0
"""For a store that may be on the machine that is lost."""


def join_limit_s(timeout_s: float, heartbeat_timeout_s: float) -> float:
    """Seconds from the first attempt of a process to join until all have; 0: no limit."""
    return min(timeout_s, _TIMEOUTS_TO_START * heartbeat_timeout_s)


def announce(store: dist.Store, rank: int) -> None:
    """Record in the store that this process has started, for the reports of others."""
    store.set(_key(rank), "")


class JoinLimit:
    """Ends this process if the others have not joined in time; a context manager."""

    def __init__(
        self,
        limit_s: float,
        missing: Callable[[], str] | None = None,
        *,
        heartbeat_timeout_s: float = 0.0,
        end_process: EndProcess = os._exit,
    ) -> None:
        """Args: see `join_limit_s`; `missing` and `end_process` are for tests."""
        self._limit_s = limit_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._is_over = threading.Event()
        self._missing = missing or _missing
        self._end_process = end_process
        self._timer = threading.Timer(limit_s, self._expired)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        """Start counting, if there are other processes and a limit."""
        if self._limit_s and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._timer.start()
            launch = Launch.from_environment()
            is_first_here = os.environ.get("LOCAL_RANK") == "0"  # ends with the others of a machine
            if launch is not None and is_first_here and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
                threading.Thread(target=self._watch, args=[launch], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """The process has joined, or failed to."""
        self._timer.cancel()
        self._is_over.set()

    def joined(self) -> None:
        """All processes have joined."""
        self.__exit__()
        launch = Launch.from_environment()
        if launch is not None and os.environ.get("RANK") == "0":
            threading.Thread(target=_note_joined, args=[launch], daemon=True).start()

    def _watch(self, launch: Launch) -> None:
        """End with the start of the workers, if the launchers report its end."""
        next_machine = (int(os.environ["GROUP_RANK"]) + 1) % int(os.environ["GROUP_WORLD_SIZE"])
        store = f"the store of the launchers ({launch.host}:{launch.port})"
        silent = LaunchEnd(f"{store} does not answer", EXIT_PEER_LOST)
        end, limit_s = None, self._heartbeat_timeout_s
        try:
            with time_limit(limit_s, lambda: self._end(silent)):
                notes = launch.connect(limit_s)
            watch = NeighborWatch(notes, next_machine, limit_s)
            while end is None and not self._is_over.wait(BEAT_S):
                with time_limit(limit_s, lambda: self._end(silent)):
                    end = watch.look(time.monotonic())
        except dist.DistError:
            end = LaunchEnd(f"{store} has ended", EXIT_PEER_LOST)
        if end is not None:
            self._end(end)

    def _end(self, end: LaunchEnd) -> None:
        def message() -> str:
            return (
                f"megatron-idpo: error (rank {os.environ['RANK']}): {end.reason}, before all "
                f"processes have joined. This process ends (exit code {end.code}); the same "
                "command resumes"
            )

        if not self._is_over.is_set():
            end_with(message, self._end_process, end.code)

    def _expired(self) -> None:
        def message() -> str:
            return (
                f"megatron-idpo: error (rank {os.environ['RANK']}): not all processes have joined "
                f"within {self._limit_s:.0f} s: {self._missing()}. This process ends (exit code "
                f"{EXIT_PEER_LOST}); the same command resumes. If processes need longer to start, "
                "raise training.heartbeat_timeout_s (the limit is ten times that)"
            )

        end_with(message, self._end_process)


def _note_joined(launch: Launch) -> None:
    with suppress(dist.DistError):  # heartbeats notice the loss of its host
        set_joined(launch.connect(_JOINED_S))


def _key(rank: int) -> str:
    # The store is that of torchrun, and outlives a restart.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"megatron_idpo/started/{attempt}/{rank}"


def _missing() -> str:
    """Which processes have not started, as far as the store knows."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=_LOOK_UP_S)
    try:
        # Not the main thread's connection, which is waiting for an answer.
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        own, ranks = int(os.environ["RANK"]), range(int(os.environ["WORLD_SIZE"]))
        # Where torchrun has no store, rank 0 makes one and waits there for all others.
        missing = [rank for rank in ranks if rank != own and not store.check([_key(rank)])]
    except Exception:  # of any kind: the process must end
        return f"the store at {host}:{port} does not answer"
    if not missing:
        return (
            "all have started, but they cannot connect to each other (GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name the network)"
        )
    noun = "ranks" if missing[1:] else "rank"
    return f"{noun} {ranges(missing)} of {len(ranks)} did not start, or cannot be reached"
