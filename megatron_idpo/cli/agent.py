"""torchrun's agent with exit codes for schedulers, and stop signals for the workers.

torchrun alone exits with 1 for every failure of its workers, kills them 30 s after a SIGTERM even
if they are still saving, and ends at a SIGUSR1 while the workers continue. When one worker has
failed, it ends the others, and reports them as failed too. `launch/node.py` and `--processes` use
what is here.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, cast

import psutil
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous.api import RendezvousHandler
from torch.distributed.launcher import api as launcher

from megatron_idpo.cli.errors import EXIT_INTERRUPTED
from megatron_idpo.cli.rendezvous import LauncherNotes, PatientRendezvous, announce_launch
from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR
from megatron_idpo.mcore.watchdog.watch import LAUNCHER_PID

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that announce a stop: those that workers handle (`mcore/parallel/world.py`, which is not
imported here, because that takes seconds). torchrun handles the others."""

_NEWS_S = 3.0
"""Until each agent knows of a machine that wants to join: torchrun caches that for a second."""

_POLL_S = 0.1

_END_AFTER_LOSS_S = 10
"""For the other workers to end after one has lost a peer: they know of the loss too. torchrun waits
30 s, in which a lost worker, which is stopped or hangs, does not end."""

_TORCHRUN_ENDED = (-signal.SIGTERM, -signal.SIGKILL)
"""Exit codes of workers that torchrun ends."""


def use_agent(stop_requested: Callable[[], bool]) -> None:
    """Have torchrun start the workers of this machine with `agent_type`."""
    launcher.LocalElasticAgent = agent_type(stop_requested)  # type: ignore[misc]


def agent_type(stop_requested: Callable[[], bool]) -> type[LocalElasticAgent]:
    """torchrun's agent of a machine, which restarts only what a restart can help."""

    class Agent(LocalElasticAgent):
        _notes: LauncherNotes | None = None

        def __init__(self, spec: WorkerSpec, *arguments: Any, **options: Any) -> None:
            spec.rdzv_handler = cast(RendezvousHandler, PatientRendezvous(spec.rdzv_handler))
            super().__init__(spec, *arguments, **options)

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            if self._notes is not None:
                self._notes.close()
            restarts = worker_group.spec.max_restarts - self._remaining_restarts
            self._notes = announce_launch(worker_group, restarts)
            started: dict[int, Any] = super()._start_workers(worker_group)
            self._ended = end_sooner(cast(SubprocessContext, self._pcontext), self._report)
            return started

        def _report(self, codes: Mapping[int, int]) -> None:
            if self._notes is not None:
                code = exit_code([*codes.values()], stopped=stop_requested())
                decisive = [rank for rank, own in codes.items() if code in (own, 128 + abs(own))]
                rank = min(decisive or codes)
                self._notes.report_end(rank, codes[rank], code)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result: RunResult = super()._monitor_workers(worker_group)
            if self._notes is not None and result.state is WorkerState.SUCCEEDED:
                self._notes.close()
            result.failures = {
                rank: failure
                for rank, failure in result.failures.items()
                if failure.pid not in self._ended or failure.exitcode not in _TORCHRUN_ENDED
            }
            codes = [failure.exitcode for failure in result.failures.values()]
            if not codes:
                return result
            code = exit_code(codes, stopped=False)
            if code == EXIT_PREEMPTED and not stop_requested() and _is_growing(worker_group):
                # torchrun restarts healthy workers when a machine is waiting, which costs no
                # restart of --max-restarts.
                return RunResult(state=WorkerState.HEALTHY)
            if stop_requested() or code in (EXIT_PREEMPTED, EXIT_USER_ERROR):
                self._remaining_restarts = 0
            return result

    return Agent


def end_sooner(workers: SubprocessContext, report: Callable[[Mapping[int, int]], None]) -> set[int]:
    """Shorten the time that torchrun waits for the other workers when one has lost a peer.

    Args:
        workers: of this machine.
        report: called with the exit codes of workers that have failed, by local rank, before that.

    Returns:
        Process ids of the workers that had not ended by themselves; filled when torchrun ends them.
    """
    close, ended = workers.close, set[int]()

    def close_sooner(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        processes = [handler.proc for handler in workers.subprocess_handlers.values()]
        ended.update(process.pid for process in processes if process.poll() is None)
        if any(process.returncode == EXIT_PEER_LOST for process in processes):
            timeout = min(timeout, _END_AFTER_LOSS_S)
        handlers = workers.subprocess_handlers.items()
        codes = {rank: handler.proc.returncode for rank, handler in handlers}
        if failed := {rank: code for rank, code in codes.items() if code}:
            report(failed)
        close(death_sig, timeout)

    workers.close = close_sooner  # type: ignore[method-assign]
    return ended


def _is_growing(worker_group: WorkerGroup) -> bool:
    """Whether another machine wants to join.

    Then agents send SIGTERM to their workers. The first one to notice the machine thereby stops
    the workers of all others, which may look like the end of the run to an agent that has not.
    """
    handler = worker_group.spec.rdzv_handler
    settings = getattr(handler, "settings", None)  # none in the static rendezvous
    num_machines = worker_group.group_world_size or 0
    if settings is None or num_machines >= settings.max_nodes:
        return False
    until_s = time.monotonic() + _NEWS_S
    while handler.num_nodes_waiting() == 0:
        if time.monotonic() >= until_s:
            return False
        time.sleep(_POLL_S)
    return True


def exit_code(codes: Sequence[int], *, stopped: bool) -> int:
    """The exit code of this machine: that of the first failure, except for less informative ones.

    A user error is the most informative. A lost peer is less so, because the peer has its own code.

    Args:
        codes: exit codes of the failed workers in order of time, negative for a signal; without
            those that torchrun has ended.
        stopped: whether a stop was requested. A worker that the signal itself ended had not
            installed its handlers, so it had nothing to save.
    """
    stop_codes = {EXIT_PREEMPTED, *(-number for number in STOP_SIGNALS if stopped)}
    failed = [code for code in codes if code not in stop_codes]
    if not failed:
        return EXIT_PREEMPTED
    priority = {EXIT_USER_ERROR: 0, EXIT_PEER_LOST: 2}
    first = min(failed, key=lambda code: priority.get(code, 1))
    return first if first > 0 else 128 - first


class SignalForwarder:
    """Forwards stop signals to the workers, within the block.

    In a thread: Python runs signal handlers in the main thread between bytecodes, and that thread
    may be inside a C++ call that waits for other machines.
    """

    def __init__(self, signals: Mapping[signal.Signals, signal.Signals] | None = None) -> None:
        """Args: what the workers receive for each signal, in addition to `STOP_SIGNALS`."""
        self.signals = {number: number for number in STOP_SIGNALS} | dict(signals or {})
        # The terminal has gone. Workers do not handle that, and torchrun would forward it as it is,
        # even if nohup has it ignored.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.signals[signal.SIGHUP] = signal.SIGTERM
        self.received: list[signal.Signals] = []
        """Every forwarded signal so far."""

        self._pipe, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has arrived."""
        return bool(self.received)

    def __enter__(self) -> Self:
        """Install the handlers and start the thread; workers learn which process this is."""
        os.environ[LAUNCHER_PID] = str(os.getpid())
        # Children that are there already are not workers.
        self._others = {child.pid for child in psutil.Process().children()}
        self._wakeup = signal.set_wakeup_fd(self._write_end)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in self.signals}
        threading.Thread(target=self._forward, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the handlers; the thread ends."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_end)

    def _forward(self) -> None:
        while data := os.read(self._pipe, 1):
            if data[0] not in self.signals:
                continue
            number = signal.Signals(data[0])
            # Ctrl-C once stops and saves; Ctrl-C again does not wait for that.
            is_repeated = number == signal.SIGINT and number in self.received
            self.received.append(number)
            children = psutil.Process().children()
            workers = [child for child in children if child.pid not in self._others]
            if not workers:  # none started yet
                os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGKILL if is_repeated else self.signals[number])
        os.close(self._pipe)
