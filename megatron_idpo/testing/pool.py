"""A pool of CPU worker processes that run a function as the ranks of one job.

What: `WorkerPool.run(function, world_size, ...)` calls a module-level function on that many
processes at once, each with torch.distributed initialised over gloo and Megatron-Core's CUDA calls
redirected to the CPU, and returns the results in rank order.

Why a pool: importing torch and Megatron-Core costs seconds per process, a call on workers that
exist costs milliseconds. Workers are started when a call first needs them and kept.

What it does not do: use a GPU (workers are started with none visible), or run on several machines.
Rendezvous goes through a file, so no port has to be free.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from megatron_idpo.testing import wire
from megatron_idpo.testing.messages import Call, FunctionReference, Outcome, Ready
from megatron_idpo.testing.worker_process import WorkerProcess

_START_TIMEOUT_S = 300.0
"""For importing torch and Megatron-Core on a busy machine."""

_GRACE_S = 5.0
"""How long the other ranks have to finish after one failed, before they are replaced."""


class WorkerError(RuntimeError):
    """A worker died or hung, or failed with an exception that cannot be sent between processes."""


class WorkerPool:
    """CPU worker processes that are started on demand, reused, and replaced when they break.

    A context manager; `run` does the work. Not for use from several threads at once.
    """

    def __init__(self, max_workers: int = 8) -> None:
        """A pool of at most `max_workers` processes, none of which is started yet."""
        if max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, not {max_workers}")
        self.max_workers = max_workers
        self._workers: list[WorkerProcess] = []
        self._directory = tempfile.TemporaryDirectory(prefix="megatron-idpo-workers-")
        self._started = 0
        self._calls = 0

    def __enter__(self) -> Self:
        """The pool itself; workers start with the first call."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pool."""
        self.close()

    def close(self) -> None:
        """End all workers; a later `run` would start new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.close()
        self._directory.cleanup()

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 120.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on `world_size` ranks.

        Args:
            function: A module-level function; it is passed by name, its arguments and result are
                pickled. It finds torch.distributed initialised (gloo), RANK, WORLD_SIZE and
                LOCAL_RANK set, and Megatron-Core's CUDA calls redirected to the CPU. Whatever
                parallel state it leaves is destroyed after it.
            world_size: Number of ranks, 1 to `max_workers`.
            *args: Passed on.
            timeout_s: Seconds until the call counts as hung; starting workers is not included.
            **kwargs: Passed on.

        Returns:
            The ranks' results, in rank order.

        Raises:
            WorkerError: A rank hung (with its stack) or died (with its exit code).
            Exception: What the first failing rank raised, with that rank's traceback as a note.
        """
        if not 1 <= world_size <= self.max_workers:
            raise ValueError(f"world_size must be 1 to {self.max_workers}, not {world_size}")
        reference = _reference(function)
        arguments = wire.dumps((args, kwargs))
        try:
            workers = self._ready(world_size)
            self._calls += 1
            store = str(Path(self._directory.name) / f"rendezvous-{self._calls}")
            for rank, worker in enumerate(workers):
                call = Call(reference, arguments, rank, world_size, store, timeout_s)
                worker.connection.send(call)
            outcomes, loss = _collect(workers, timeout_s)
        except BaseException:
            # Whatever broke the call off, these workers are in the middle of it.
            self._discard(self._workers[:world_size])
            raise
        answered = zip(workers, outcomes, strict=True)
        self._discard([worker for worker, outcome in answered if outcome is None])
        if loss is not None:
            raise loss
        return _results(outcomes)

    def _ready(self, world_size: int) -> list[WorkerProcess]:
        """The first `world_size` workers, started where they are missing or gone."""
        self._discard([worker for worker in self._workers if not worker.is_idle])
        fresh = []
        while len(self._workers) < world_size:
            self._started += 1
            fresh.append(WorkerProcess(Path(self._directory.name) / f"stacks-{self._started}"))
            self._workers.append(fresh[-1])
        deadline = time.monotonic() + _START_TIMEOUT_S
        for worker in fresh:
            if not worker.connection.poll(max(0.0, deadline - time.monotonic())):
                raise WorkerError(f"a worker did not start within {_START_TIMEOUT_S:.0f} s")
            if not isinstance(worker.receive(), Ready):
                raise WorkerError(f"a worker ended while starting ({worker.ending()}); see above")
        return self._workers[:world_size]

    def _discard(self, workers: Sequence[WorkerProcess]) -> None:
        """Kill workers whose state nobody knows; the next call starts others in their place."""
        for worker in workers:
            self._workers.remove(worker)
            worker.kill()


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    **kwargs: Any,
) -> list[Any]:
    """`WorkerPool.run` on a pool that lives for this one call; see there."""
    with WorkerPool(max_workers=world_size) as pool:
        return pool.run(function, world_size, *args, timeout_s=timeout_s, **kwargs)


def _reference(function: Callable[..., Any]) -> FunctionReference:
    """How a worker finds `function`.

    Raises:
        TypeError: It is a lambda, a local function or anything else without an importable name.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    qualname = getattr(function, "__qualname__", "")
    path = getattr(module, "__file__", None)
    found: Any = module
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if module is None or path is None or found is not function:
        raise TypeError(
            f"{qualname or function!r} is not a module-level function of an importable file; "
            "workers get their function by name, so move it to the top of its module"
        )
    return FunctionReference(module.__name__, str(Path(path).resolve()), qualname)


def _collect(
    workers: Sequence[WorkerProcess], timeout_s: float
) -> tuple[list[Outcome | None], WorkerError | None]:
    """Each rank's outcome, None for those that gave none, and the error if a rank was lost.

    A rank is lost that died, or that had not finished after `timeout_s` though none failed; one
    that did not end after another's failure has no outcome, but the failure is the story.
    """
    outcomes: list[Outcome | None] = [None] * len(workers)
    pending = {worker.connection: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout_s
    dead: list[int] = []
    while pending:
        answered = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not answered:
            break
        for connection in answered:
            rank = pending.pop(cast(Connection, connection))
            outcome = outcomes[rank] = workers[rank].receive()
            if outcome is None:
                dead.append(rank)
            if outcome is None or outcome.result is None:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    # A death explains the connection errors of the others, whichever was noticed first.
    if dead:
        return outcomes, WorkerError(_format_of(dead, workers, "died", timeout_s))
    if pending and not any(outcome and outcome.result is None for outcome in outcomes):
        hung = sorted(pending.values())
        return outcomes, WorkerError(_format_of(hung, workers, "hung", timeout_s))
    return outcomes, None


def _format_of(
    ranks: Sequence[int], workers: Sequence[WorkerProcess], fate: str, timeout_s: float
) -> str:
    """What happened to these ranks and where they were."""
    lines = []
    for rank in ranks:
        worker = workers[rank]
        how = worker.ending() if fate == "died" else f"not finished after {timeout_s:g} s"
        lines.append(f"rank {rank} of {len(workers)} {fate} ({how})")
        lines.append(worker.stack().rstrip() or "it left no stack")
    return "\n".join(lines)


def _results(outcomes: Sequence[Outcome | None]) -> list[Any]:
    """The results of a call that succeeded; raises what the first failing rank raised."""
    failures = [
        (outcome.failed_at_s, rank, outcome)
        for rank, outcome in enumerate(outcomes)
        if outcome is not None and outcome.result is None
    ]
    if not failures:
        return [wire.loads(outcome.result) for outcome in outcomes if outcome and outcome.result]
    _, rank, failure = min(failures, key=lambda entry: entry[:2])
    message = f"rank {rank} of {len(outcomes)} raised:\n{failure.traceback}"
    if failure.exception is None:
        raise WorkerError(f"{failure.description}\n{message}")
    error = wire.loads(failure.exception)
    error.add_note(message)
    raise error
