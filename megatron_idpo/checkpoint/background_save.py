"""Runs one job on a thread of every rank while training continues.

The job's collectives use their own process group, so they cannot be matched with those of training.
It ends on all ranks with the same outcome: success, or the error of the first rank that failed.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_idpo.errors import EXIT_PEER_LOST, CheckpointError, ConfigError
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.groups import create_group
from megatron_idpo.mcore.parallel.world import all_gather_objects, collective_timeout


class BackgroundWorker:
    """Runs one job at a time; all ranks start, poll and wait for the same jobs."""

    def __init__(self) -> None:
        """Collective: creates a process group over the CPU for the jobs, and connects it.

        The group is destroyed with the running layout.

        Raises:
            ConfigError: the processes cannot connect to each other over the CPU.
        """
        self.group = _group_of_all_ranks()
        _check_connections(self.group)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether a job was started and neither `poll` nor `wait` has reported its end."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Starts a job. It may use `self.group`; `poll` and `wait` raise its errors.

        The job must end on every rank: a rank that fails must not leave others in a collective.
        """
        assert self._thread is None, "one job at a time"
        self._error = None
        # A daemon, so that a process that fails elsewhere can exit and report its error.
        self._thread = threading.Thread(
            target=self._run, args=(job,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def poll(self) -> bool:
        """Whether the job has ended on every rank. Collective while a job runs.

        One all-reduce of one integer over the default group.

        Raises:
            CheckpointError: on every rank, if the job failed.
        """
        if self._thread is None:
            return False
        # The job has its own group, so this one is free. A second group over the CPU would be as
        # many sockets per process as there are ranks.
        has_ended = int(not self._thread.is_alive())
        ended = torch.full((), has_ended, dtype=torch.int32, device=default_device())
        # MIN: without it, ranks would disagree on whether the job has ended.
        dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        return bool(ended) and self.wait()

    def wait(self) -> bool:
        """Waits for the job if there is one; returns whether there was. Not collective.

        Raises:
            CheckpointError: on every rank, if the job failed.
        """
        if self._thread is None:
            return False
        self._thread.join()
        self._thread, error = None, self._error
        self._error = None
        if error is not None:
            raise error
        return True

    def _run(self, job: Callable[[], None]) -> None:
        own_error: BaseException | None = None
        try:
            job()
        except BaseException as error:
            own_error = error
        try:
            failure = None
            if own_error is not None:
                code = getattr(own_error, "exit_code", CheckpointError.exit_code)
                failure = (str(own_error), code)
            failures = all_gather_objects(failure, self.group)
            self._error = own_error
            first = next((failure for failure in failures if failure is not None), None)
            if own_error is None and first is not None:
                raised = CheckpointError(first[0])
                raised.exit_code = first[1]
                self._error = raised
        except BaseException as error:  # a rank has died
            self._error = own_error or error


_CONNECT_LIMIT_S = 120.0
"""All ranks create the group at the same time; until rank 0 has heard of all."""


def _check_connections(group: dist.ProcessGroup) -> None:
    """Connect all ranks to rank 0 now. The first save would, and a GPU run trains until then.

    NCCL may use another network than gloo, which takes the address of the host's name.
    """
    limit = timedelta(seconds=_CONNECT_LIMIT_S)
    try:
        dist.monitored_barrier(group, timeout=min(limit, collective_timeout() or limit))
    except RuntimeError as error:
        reason = str(error).strip().split("\n", 1)[0]
        message = f"the processes cannot connect over gloo, as a save does ({reason})"
        remedy = "name the interface that reaches the other machines"
        raised = ConfigError.at("GLOO_SOCKET_IFNAME", message, remedy)
        # It may also be a process that was lost just now.
        raised.exit_code = EXIT_PEER_LOST
        raise raised from error


_LAZY = "TORCH_GLOO_LAZY_INIT"
"""Environment: gloo groups that are created meanwhile connect two ranks when they first exchange
something. Else every pair is connected at once, 511 sockets in each of 512 processes. The plans of
a save go to rank 0 and back, which needs connections to it and to a few neighbours."""


def _group_of_all_ranks() -> dist.ProcessGroup:
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        group = create_group(range(dist.get_world_size()), backend="gloo")
    finally:
        del os.environ[_LAZY]
        if before is not None:
            os.environ[_LAZY] = before
    assert group is not None
    return group
