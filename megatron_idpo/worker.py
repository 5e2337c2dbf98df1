"""The worker process behind `megatron_idpo.testing.WorkerPool`: one rank, many calls.

What: a loop that reads a call from a pipe, joins a fresh gloo process group under the rank it is
given, runs the function, answers with its result or its exception, and leaves Megatron-Core's
parallel state and the process group behind. Torch and Megatron-Core are imported once, which is
why a worker is kept between calls.

What it does not do: start, time or replace processes; that is the pool's side. It holds nothing of
one call for the next but imported modules.

Protocol, pickled over one duplex pipe: the worker says `Ready`, then for each `Call` it receives it
sends one `Outcome`; the end of the pipe ends the process.
"""

import contextlib
import datetime
import faulthandler
import gc
import importlib
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from megatron_idpo import wire


@dataclass(frozen=True)
class FunctionReference:
    """A module-level function, named so that another process finds it."""

    module: str
    path: str
    """The module's file: test modules are often importable by path only."""

    qualname: str

    def resolve(self) -> Callable[..., Any]:
        """The function itself, importing its module by name or else by path."""
        found: Any = _load_module(self.module, self.path)
        for name in self.qualname.split("."):
            found = getattr(found, name)
        resolved: Callable[..., Any] = found
        return resolved


@dataclass(frozen=True)
class Call:
    """One rank's share of a `WorkerPool.run`."""

    function: FunctionReference
    arguments: bytes
    """Pickled `(args, kwargs)`, opened only after the function's module is loaded."""

    rank: int
    world_size: int
    store: str
    """The rendezvous file, fresh for every call."""

    timeout_s: float


@dataclass(frozen=True)
class Ready:
    """The worker has imported everything and takes calls."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call."""

    result: bytes | None
    """The pickled result, or None if the call failed."""

    failed_at_s: float = 0.0
    """`time.monotonic()` of the failure: one clock for all processes of a machine."""

    exception: bytes | None = None
    """The pickled exception, or None where it cannot be pickled."""

    description: str = ""
    """The exception's type and message on one line."""

    traceback: str = ""


def _load_module(name: str, path: str) -> ModuleType:
    """Import module `name`, from `path` where the name alone does not lead there; cached."""
    if name == "__main__":
        # The caller's script, whose `if __name__ == "__main__"` part must not run here.
        name = "__mp_main__"
    loaded = sys.modules.get(name)
    if loaded is not None and _is_file_of(loaded, path):
        return loaded
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and _same(spec.origin, path):
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {name} from {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_file_of(module: ModuleType, path: str) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and _same(origin, path)


def _same(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


@contextlib.contextmanager
def _process_group(call: Call) -> Iterator[None]:
    """A gloo group for one call; on leaving, Megatron-Core's global state goes as well."""
    import torch

    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(call.rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(call.world_size)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(call.store, call.world_size),
        rank=call.rank,
        world_size=call.world_size,
        # Longer than the pool waits, so that a hang is the pool's to report, with its stacks.
        timeout=datetime.timedelta(seconds=2 * call.timeout_s + 60),
    )
    torch.manual_seed(0)
    try:
        yield
    finally:
        _forget_megatron_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()


def _forget_megatron_state() -> None:
    """Drop the process-wide state that Megatron-Core would carry into the next call."""
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    random._unset_checkpointing()


def _answer(call: Call) -> Outcome:
    """Run one call to its outcome; nothing escapes but the end of the process."""
    try:
        function = call.function.resolve()
        args, kwargs = wire.loads(call.arguments)
        with _process_group(call):
            try:
                outcome = Outcome(result=wire.dumps(function(*args, **kwargs)))
            except BaseException as error:
                # Answered before the group is destroyed: that makes the other ranks fail too, and
                # the first failure is the one worth reading.
                return _failure(error)
            _wait_for_other_ranks()
            return outcome
    except BaseException as error:
        return _failure(error)


def _wait_for_other_ranks() -> None:
    """Keep the group open until nobody reads from it; a rank that failed ends the wait."""
    import torch

    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.distributed.barrier()


def _failure(error: BaseException) -> Outcome:
    failed_at_s = time.monotonic()
    told = traceback.format_exc()
    # The frames hold the call's tensors and process groups; the text above has replaced them.
    traceback.clear_frames(error.__traceback__)
    try:
        pickled = wire.dumps(error)
        wire.loads(pickled)
    except Exception:
        pickled = None
    return Outcome(
        result=None,
        failed_at_s=failed_at_s,
        exception=pickled,
        description=f"{type(error).__name__}: {error}",
        traceback=told,
    )


def serve(connection: Connection) -> None:
    """Answer calls until the pipe ends."""
    import torch

    from megatron_idpo.mcore.cpu import redirect_cuda_to_cpu

    torch.set_num_threads(1)
    redirect_cuda_to_cpu()
    # What was imported stays; without this every collection after a call would walk all of it.
    gc.freeze()
    connection.send(Ready())
    while True:
        try:
            call = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(_answer(call))


def main(descriptor: int, stacks_path: str) -> None:
    """Run a worker on an inherited pipe descriptor, dumping stacks to a file when asked to."""
    # Processes that the worker starts must not keep its pipe open.
    os.set_inheritable(descriptor, False)
    # Kept open for the life of the process: faulthandler writes to the bare descriptor.
    stacks = open(stacks_path, "w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    with Connection(descriptor) as connection:
        serve(connection)


if __name__ == "__main__":
    # Under its own name, so that messages are the same classes on both sides of the pipe.
    from megatron_idpo import worker

    worker.main(int(sys.argv[1]), sys.argv[2])
