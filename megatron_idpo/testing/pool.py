"""A pool of worker processes that run a function as the ranks of one job.

`WorkerPool.run(function, world_size, ...)` calls a module-level function on that many processes at
once, each with torch.distributed initialized over gloo and Megatron-Core's CUDA calls redirected to
the CPU, and returns the results in rank order.

Importing torch and Megatron-Core takes seconds per process, a call on a running worker takes
milliseconds. So one server process imports them (`fork_server.py`), workers are forked from it when
a call first needs them, and kept.

Workers compute on the CPU, or on phantom GPUs (`phantom_gpu/`), so that a test can run on both. Not
supported: real GPUs (none are visible to workers), several machines. Rendezvous uses a file, so no
port has to be free.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Self, cast

from megatron_idpo.testing import phantom_gpu
from megatron_idpo.testing.messages import Call, FunctionReference, Outcome, dumps, loads
from megatron_idpo.testing.phantom_gpu.launch import free_port
from megatron_idpo.testing.processes import ForkServer

_START_TIMEOUT_S = 300.0
"""For importing torch and Megatron-Core on a busy machine."""

_PEER_GRACE_S = 5.0
"""Time for the other ranks to finish after one failed, before they are replaced."""

_EXIT_GRACE_S = 5.0
_STACK_GRACE_S = 10.0
_POLL_S = 0.01


class WorkerError(RuntimeError):
    """A worker died or hung, or failed with an exception that cannot be sent between processes."""


class WorkerPool:
    """Worker processes that are started on demand, reused, and replaced when they break.

    A context manager; `run` does the work. Not for use from several threads at once.
    """

    def __init__(self, max_workers: int = 8, *, device: Literal["cpu", "phantom"] = "cpu") -> None:
        """Create a pool of at most `max_workers` processes; none is started yet.

        Args:
            max_workers: at least 1.
            device: `phantom` gives each worker a phantom GPU with arithmetic, within
                `phantom_gpu.device.phantom()`; requires that `phantom_gpu.why_not()` is None.
        """
        if max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, not {max_workers}")
        self.max_workers = max_workers
        self.device = device
        self._workers: list[WorkerProcess] = []
        self._server: ForkServer | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="megatron-idpo-workers-")
        self._started = 0
        self._calls = 0

    def __enter__(self) -> Self:
        """The pool itself; workers start with the first call."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    def close(self) -> None:
        """End all workers; a later `run` would start new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.close()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._directory.cleanup()

    def replace_workers(self) -> None:
        """End all workers; the next call forks new ones.

        For functions that change their process in a way that others would notice.
        """
        self._discard(list(self._workers))

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
                pickled. It runs with torch.distributed initialized (gloo), RANK, WORLD_SIZE and
                LOCAL_RANK set, and Megatron-Core's CUDA calls redirected to the CPU or served by
                a phantom GPU. Parallel state that it leaves is destroyed afterwards.
            world_size: Number of ranks, 1 to `max_workers`.
            *args: Positional arguments of `function`.
            timeout_s: Seconds until the call counts as hung, without the start of workers.
            **kwargs: Keyword arguments of `function`.

        Returns:
            The ranks' results, in rank order.

        Raises:
            WorkerError: A rank hung (with its stack) or died (with its exit code).
            Exception: The exception of the first failing rank, with its traceback as a note.
        """
        return self._call(function, world_size, (args, kwargs), timeout_s, is_program=False)

    def run_as_program(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 120.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function` as the main function of programs that torchrun starts.

        Unlike in `run`, each rank is a new process, which ends after the call, and the function
        joins the other ranks itself: torchrun's environment variables are set (with one rank there
        are none, as for a plain program), but no process group exists. For functions that choose
        their device (a phantom GPU within `phantom_gpu.device.phantom()`), change their process, or
        fork: it has a single thread.

        The arguments, the results and the errors are those of `run`.
        """
        # The workers of `run` are kept for later calls.
        reused, self._workers = self._workers, []
        try:
            return self._call(function, world_size, (args, kwargs), timeout_s, is_program=True)
        finally:
            self.replace_workers()
            self._workers = reused

    def _call(
        self,
        function: Callable[..., Any],
        world_size: int,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        timeout_s: float,
        *,
        is_program: bool,
    ) -> list[Any]:
        if not 1 <= world_size <= self.max_workers:
            raise ValueError(f"world_size must be 1 to {self.max_workers}, not {world_size}")
        reference = _reference(function)
        pickled = dumps(arguments)
        try:
            workers = self._ready(world_size)
            self._calls += 1
            store = str(Path(self._directory.name) / f"rendezvous-{self._calls}")
            port = free_port() if is_program else None
            for rank, worker in enumerate(workers):
                call = Call(reference, pickled, rank, world_size, store, port, timeout_s)
                worker.connection.send(call)
            outcomes, error = _collect(workers, timeout_s)
        except BaseException:
            # These workers are still in the middle of the interrupted call.
            self._discard(self._workers[:world_size])
            raise
        answered = zip(workers, outcomes, strict=True)
        self._discard([worker for worker, outcome in answered if outcome is None])
        if error is not None:
            raise error
        return _results(outcomes)

    def _ready(self, world_size: int) -> list["WorkerProcess"]:
        """The first `world_size` workers; starts those that are missing or have ended."""
        self._discard([worker for worker in self._workers if not worker.is_idle])
        if self._server is None:
            self._server = ForkServer(self._environment(), _START_TIMEOUT_S)
        while len(self._workers) < world_size:
            self._started += 1
            stacks = Path(self._directory.name) / f"stacks-{self._started}"
            try:
                worker = WorkerProcess(self._server, stacks)
            except ChildProcessError as error:
                raise WorkerError(str(error)) from None
            self._workers.append(worker)
        return self._workers[:world_size]

    def _environment(self) -> dict[str, str]:
        if self.device == "cpu":
            return _cpu_environment()
        return {**phantom_gpu.environment(gpus=self.max_workers), **_single_threaded()}

    def _discard(self, workers: Sequence["WorkerProcess"]) -> None:
        """Kill workers in an unknown state; the next call starts new ones."""
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
    """`WorkerPool.run` on a pool for this one call."""
    with WorkerPool(max_workers=world_size) as pool:
        return pool.run(function, world_size, *args, timeout_s=timeout_s, **kwargs)


def _reference(function: Callable[..., Any]) -> FunctionReference:
    """The name by which a worker imports `function`.

    Raises:
        TypeError: A lambda, a local function or anything else without an importable name.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    qualname = getattr(function, "__qualname__", "")
    path = getattr(module, "__file__", None)
    value: Any = module
    for name in qualname.split("."):
        value = getattr(value, name, None)
    if module is None or path is None or value is not function:
        raise TypeError(
            f"{qualname or function!r} is not a module-level function of an importable file; "
            "workers import it by name, so move it to the top level of its module"
        )
    return FunctionReference(module.__name__, str(Path(path).resolve()), qualname)


def _collect(
    workers: Sequence["WorkerProcess"], timeout_s: float
) -> tuple[list[Outcome | None], WorkerError | None]:
    """Each rank's outcome, None without one, and an error if a rank died or hung.

    A rank hung if it did not finish within `timeout_s` although none failed. A rank that does not
    finish after another's failure has no outcome; the failure is reported.
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
                deadline = min(deadline, time.monotonic() + _PEER_GRACE_S)
    # A death causes connection errors on other ranks, which may arrive first.
    if dead:
        return outcomes, WorkerError(_describe(dead, workers, "died", timeout_s))
    if pending and not any(outcome and outcome.result is None for outcome in outcomes):
        hung = sorted(pending.values())
        return outcomes, WorkerError(_describe(hung, workers, "hung", timeout_s))
    return outcomes, None


def _describe(
    ranks: Sequence[int], workers: Sequence["WorkerProcess"], state: str, timeout_s: float
) -> str:
    """State and stack of ranks that died or hung."""
    lines = []
    for rank in ranks:
        worker = workers[rank]
        reason = worker.exit_reason() if state == "died" else f"not finished after {timeout_s:g} s"
        lines.append(f"rank {rank} of {len(workers)} {state} ({reason})")
        lines.append(worker.stack().rstrip() or "no stack available")
    return "\n".join(lines)


def _results(outcomes: Sequence[Outcome | None]) -> list[Any]:
    """The results of a successful call; raises the exception of the first failing rank."""
    failures = [
        (outcome.failed_at_s, rank, outcome)
        for rank, outcome in enumerate(outcomes)
        if outcome is not None and outcome.result is None
    ]
    if not failures:
        return [loads(outcome.result) for outcome in outcomes if outcome and outcome.result]
    _, rank, failure = min(failures, key=lambda entry: entry[:2])
    message = f"rank {rank} of {len(outcomes)} raised:\n{failure.traceback}"
    if failure.exception is None:
        raise WorkerError(f"{failure.description}\n{message}")
    error = loads(failure.exception)
    error.add_note(message)
    raise error


class WorkerProcess:
    """The pool's end of one worker: its process and the pipe to it."""

    def __init__(self, server: ForkServer, stacks: Path) -> None:
        """Start the process. On request it writes its Python stack to the file `stacks`."""
        self.stacks = stacks
        stacks.touch()
        self.connection, worker_end = Pipe()
        with worker_end:
            self.process = server.fork(stacks, worker_end)

    @property
    def is_idle(self) -> bool:
        """Whether the process waits for a call; the pipe of an ended one is readable."""
        return not self.connection.poll()

    def receive(self) -> Any:
        """The next message, or None if the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def exit_reason(self) -> str:
        """The exit code or signal of a process whose pipe has ended."""
        self.kill()
        code = self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stack(self) -> str:
        """The Python stack of a running process, or the one a crash left behind; may be empty."""
        before = size = self.stacks.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _STACK_GRACE_S
        while self.process.returncode is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            previous, size = size, self.stacks.stat().st_size
            # The dump is written frame by frame; it is complete when it stops growing.
            if before < previous == size:
                break
        return self.stacks.read_text()

    def close(self) -> None:
        """Close the pipe, which ends the process; kill it if it does not end soon."""
        self.connection.close()
        try:
            self.process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process and its children now."""
        self.connection.close()
        self.process.send_signal(signal.SIGKILL, is_group=True)
        self.process.wait()


def _cpu_environment() -> dict[str, str]:
    search_path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(search_path),
        **_single_threaded(),
    }


def _single_threaded() -> dict[str, str]:
    """Environment variables of every worker."""
    variables = {
        # Megatron-Core warns without it with tensor and sequence parallelism.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # By default gloo resolves the host name, which may not belong to a local interface.
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if loopback is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        variables["GLOO_SOCKET_IFNAME"] = loopback
    return variables
