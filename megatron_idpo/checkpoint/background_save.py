"""One piece of work on a thread of every rank, beside the training step.

Its collectives go over a process group of its own, so that they cannot get between training's. It
ends on all ranks with the same outcome: done, or the error of the first rank that failed.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_idpo.errors import CheckpointError

_PATIENCE = timedelta(hours=2)
"""For the slowest rank's disk; a rank that has died is noticed at once."""


class Background:
    """Runs one job at a time; all ranks start, poll and wait for the same jobs."""

    def __init__(self) -> None:
        """Collective: two process groups over the CPU, for the jobs and for asking about them."""
        self.group = _group_of_all_ranks()
        self._asking = _group_of_all_ranks()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether a job was started and its end has not been met by `poll` or `wait`."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Begin. The job may use `self.group`; its errors are raised by `poll` and `wait`.

        It has to end on every rank: collectives in it must not leave anyone waiting for a rank that
        failed.
        """
        assert self._thread is None, "one job at a time"
        self._error = None
        # A daemon, so that it keeps no process alive that has an error to tell.
        self._thread = threading.Thread(
            target=self._run, args=(job,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def poll(self) -> bool:
        """Whether a job has ended on every rank since the last call. Collective, while one runs.

        One all-reduce of a number over the CPU.

        Raises:
            CheckpointError: on every rank, what the job failed with.
        """
        if self._thread is None:
            return False
        ended = torch.tensor(int(not self._thread.is_alive()))
        dist.all_reduce(ended, op=dist.ReduceOp.MIN, group=self._asking)
        return bool(ended) and self.wait()

    def wait(self) -> bool:
        """Wait for the job, if there is one, and whether there was. Each rank for itself.

        Raises:
            CheckpointError: on every rank, what the job failed with.
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
        mine: BaseException | None = None
        try:
            job()
        except BaseException as error:
            mine = error
        try:
            reason: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(reason, None if mine is None else str(mine), group=self.group)
            others = next((message for message in reason if message is not None), None)
            self._error = mine or (None if others is None else CheckpointError(others))
        except BaseException as error:  # a rank has died
            self._error = mine or error


def _group_of_all_ranks() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group
