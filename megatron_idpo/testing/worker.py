"""The worker process behind `megatron_idpo.testing.WorkerPool`: one rank, many calls.

What: a loop that reads a call from a pipe, joins a fresh gloo process group under the rank it is
given, runs the function, answers with its result or its exception, and leaves Megatron-Core's
parallel state and the process group behind. Torch and Megatron-Core are imported once, which is
why a worker is kept between calls.

What it does not do: start, time or replace processes; that is the pool's side. It holds nothing of
one call for the next but imported modules.

Started as `python -m megatron_idpo.testing.worker DESCRIPTOR STACKS`; the protocol is in
`messages.py`.
"""

import contextlib
import datetime
import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

from megatron_idpo.testing import wire
from megatron_idpo.testing.messages import Call, Outcome, Ready


@contextlib.contextmanager
def _process_group(call: Call) -> Iterator[None]:
    """A gloo group for one call; on leaving, Megatron-Core's global state goes as well."""
    import torch

    from megatron_idpo.mcore.parallel.process_state import forget_megatron_state

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
        forget_megatron_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()


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
    message = traceback.format_exc()
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
        traceback=message,
    )


def serve(connection: Connection) -> None:
    """Answer calls until the pipe ends."""
    import torch

    from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

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
    main(int(sys.argv[1]), sys.argv[2])
