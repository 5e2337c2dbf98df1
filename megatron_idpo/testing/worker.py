"""The worker process of `megatron_idpo.testing.WorkerPool`: one rank, many calls.

A loop reads a call from a pipe, joins a new gloo process group with the given rank, runs the
function, sends its result or exception, and destroys the process group and Megatron-Core's parallel
state. A worker is reused; only imported modules persist from one call to the next. The pool starts,
times out and replaces workers.

Forked by `fork_server.py`, which has imported torch and Megatron-Core with `prepare`; the protocol
is in `messages.py`.
"""

import contextlib
import datetime
import faulthandler
import functools
import gc
import os
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from unittest.mock import patch

from megatron_idpo.testing.messages import Call, Outcome, dumps, loads
from megatron_idpo.testing.phantom_gpu.launch import ARITHMETIC


@contextlib.contextmanager
def _device(call: Call) -> Iterator[None]:
    """The phantom GPU of this rank, in a pool of them; nothing on the CPU, or for a program."""
    if ARITHMETIC not in os.environ or call.program_port is not None:
        yield
        return
    import torch

    from megatron_idpo.testing.phantom_gpu.device import phantom

    with phantom():
        torch.cuda.set_device(call.rank)
        yield


@contextlib.contextmanager
def _process_group(call: Call) -> Iterator[None]:
    """A gloo group for one call; on exit, Megatron-Core's global state is reset as well."""
    import torch

    from megatron_idpo.mcore.parallel.groups import reset_megatron_state

    _share_gloo_device()
    _set_ranks(call)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(call.store, call.world_size),
        rank=call.rank,
        world_size=call.world_size,
        # Longer than the pool waits, so that the pool reports a hang, with stacks.
        timeout=datetime.timedelta(seconds=2 * call.timeout_s + 60),
    )
    torch.manual_seed(0)
    try:
        yield
    finally:
        reset_megatron_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()


@contextlib.contextmanager
def _program(call: Call) -> Iterator[None]:
    """torchrun's variables; the function joins the group and leaves it. One rank has none."""
    if call.world_size > 1:
        _set_ranks(call)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(call.program_port)
    yield


def _set_ranks(call: Call) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(call.rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(call.world_size)


@functools.cache
def _share_gloo_device() -> None:
    """Before the first group, and not earlier: a program may fork, and the device has a thread."""
    from megatron_idpo.mcore.cpu.gloo import share_gloo_device

    share_gloo_device()


def _run(call: Call) -> Outcome:
    """Run one call; every exception becomes an outcome."""
    try:
        function = call.function.resolve()
        args, kwargs = loads(call.arguments)
        group = _process_group(call) if call.program_port is None else _program(call)
        with _device(call), group:
            try:
                outcome = Outcome(result=dumps(function(*args, **kwargs)))
            except BaseException as error:
                # Recorded before the group is destroyed: that makes the other ranks fail too, and
                # the pool reports the first failure.
                return _failure(error)
            _wait_for_other_ranks()
            return outcome
    except BaseException as error:
        return _failure(error)


def _wait_for_other_ranks() -> None:
    """Keep the group open until no rank reads from it; a failed rank ends the wait."""
    import torch

    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.distributed.barrier()


def _failure(error: BaseException) -> Outcome:
    failed_at_s = time.monotonic()
    formatted = traceback.format_exc()
    # The frames keep the call's tensors and process groups alive.
    traceback.clear_frames(error.__traceback__)
    try:
        pickled = dumps(error)
        loads(pickled)
    except Exception:
        pickled = None
    return Outcome(
        result=None,
        failed_at_s=failed_at_s,
        exception=pickled,
        description=f"{type(error).__name__}: {error}",
        traceback=formatted,
    )


def prepare() -> None:
    """Import what every worker needs, before it is forked; torch computes on one thread."""
    import torch

    from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

    torch.set_num_threads(1)
    with suppress_megatron_warnings(), _unasked_devices():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  # lazy

        import megatron_idpo.mcore.cpu.gloo
        import megatron_idpo.mcore.model.build
        import megatron_idpo.mcore.parallel.groups
        import megatron_idpo.train.loop
        from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

        if ARITHMETIC in os.environ:
            import megatron_idpo.testing.phantom_gpu.device  # noqa: F401
        else:
            redirect_cuda_to_cpu()


@contextlib.contextmanager
def _unasked_devices() -> Iterator[None]:
    """With phantom GPUs, answer imports that ask whether there are GPUs, within the block.

    torch would ask the runtime, and then refuse to use CUDA in every forked process.
    """
    if ARITHMETIC not in os.environ:
        yield
        return
    import torch

    with patch.object(torch.cuda, "is_available", lambda: True):
        yield


def serve(connection: Connection) -> None:
    """Run calls until the pipe is closed."""
    while True:
        try:
            call = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(_run(call))


def main(descriptor: int, stacks_path: str) -> None:
    """Run a worker on an inherited pipe descriptor; SIGUSR1 dumps its stack to a file."""
    # Child processes of the worker must not keep its pipe open.
    os.set_inheritable(descriptor, False)
    # Open until the process ends: faulthandler writes to the bare descriptor.
    stacks = open(stacks_path, "w")
    faulthandler.enable(stacks)
    # Of all threads: with `all_threads=False` nothing is written if the kernel delivers the signal
    # to a thread of gloo or OpenMP, which has no Python stack.
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    if hasattr(os, "SCHED_BATCH"):
        # A rank that wakes another keeps its core until it waits itself. Small collectives among
        # more ranks than cores take a quarter of the time (docs/decisions.md).
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with Connection(descriptor) as connection:
        serve(connection)
