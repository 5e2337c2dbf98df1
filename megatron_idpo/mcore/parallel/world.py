"""The processes of a run: join them, make them fail together, stop them together.

Started by torchrun, a verb joins the world that the environment describes; started as a plain
program, it is a world of one. `raise_on_all_ranks` turns an error on any rank into the same error
on all, because a rank that stops alone leaves the others waiting in a collective until its timeout.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away. Ranks receive the signal at
different moments, so no rank stops by itself: `StopFlag` remembers it, its state travels with a
step's metrics, and all ranks stop after the same step.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.training import DEFAULT_HEARTBEAT_TIMEOUT_S, DEFAULT_TIMEOUT_S
from megatron_idpo.errors import (
    EXIT_PEER_LOST,
    CheckpointError,
    ConfigError,
    DataError,
    OutputLockedError,
    TrainingError,
    UserError,
)
from megatron_idpo.mcore.cpu.redirect import backend, default_device, redirect_cuda_to_cpu
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.mcore.watchdog.activity import doing
from megatron_idpo.mcore.watchdog.joining import JoinLimit, announce, join_limit_s
from megatron_idpo.mcore.watchdog.leaving import leaving_after
from megatron_idpo.mcore.watchdog.watch import watching

_LOG = logging.getLogger(__name__)

_RENDEZVOUS = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch needs in addition to `RANK` to find the other processes."""

_ERROR_TYPES = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        DataError,
        CheckpointError,
        OutputLockedError,
        TrainingError,
        UserError,
    )
}

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


# --- joining ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """This process's rank among all processes of the run."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the output that the user sees."""
        return self.rank == 0


_timeout: timedelta | None = None
"""Of the process groups within `distributed_world`."""


def collective_timeout() -> timedelta | None:
    """How long a collective may wait for a rank: for every new process group of a run.

    torch gives a new group the backend's default, and not the timeout of the world. None outside of
    `distributed_world`, and in a world that another program has created.
    """
    return _timeout


@contextmanager
def distributed_world(
    config: RunConfig | None = None, *, timeout_s: int | None = None
) -> Iterator[World]:
    """Join torchrun's world, or create one of this process alone; leave it at the end.

    The processes exchange heartbeats meanwhile (`watchdog/watch.py`). A process group that exists
    already (created by a test or an embedding script) is used and not destroyed, without
    heartbeats. Without a GPU, megatron-core's CUDA calls are redirected first; its warnings about
    the installation are suppressed within the block (`mcore/megatron_warnings.py`).

    Args:
        config: of the run, for `training.timeout_s` and `training.heartbeat_timeout_s`; None, or
            without that section: the defaults.
        timeout_s: instead of the configuration's.

    Raises:
        ConfigError: the environment is incomplete, or there are more ranks here than GPUs.
    """
    has_gpu = not redirect_cuda_to_cpu()
    heartbeat_timeout_s = DEFAULT_HEARTBEAT_TIMEOUT_S
    if config is not None and config.has("training"):
        timeout_s = timeout_s or config.training.timeout_s
        heartbeat_timeout_s = config.training.heartbeat_timeout_s
    timeout_s = timeout_s or DEFAULT_TIMEOUT_S
    with suppress_megatron_warnings(has_gpu=has_gpu):
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size())
            return
        limit_s = join_limit_s(timeout_s, heartbeat_timeout_s)
        with (
            JoinLimit(limit_s, heartbeat_timeout_s=heartbeat_timeout_s) as limit,
            _process_group(timedelta(seconds=timeout_s)),
            watching(timeout_s, heartbeat_timeout_s),
        ):
            limit.joined()
            yield World(dist.get_rank(), dist.get_world_size())


@contextmanager
def _process_group(timeout: timedelta) -> Iterator[None]:
    """torch's default process group, for this block."""
    global _timeout
    _check_environment()
    # Before the group exists: NCCL and new tensors use the device that is current here.
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        _rendezvous(timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(
            backend(), store=store, rank=0, world_size=1, device_id=_nccl_device()
        )
    _timeout = timeout
    try:
        yield
    finally:
        _timeout = None
        error = sys.exception()
        with nullcontext() if error is None else leaving_after(error):
            dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> None:
    """Connect to the other processes at the address in the environment."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        raise _store_error(str(error)) from error
    # From here on, an error of the network is a lost process (`cli/errors.py`).
    store.set_timeout(timeout)
    announce(store, rank)
    dist.init_process_group(
        backend(),
        store=dist.PrefixStore(_store_prefix(), store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=_nccl_device(),
    )


def _store_prefix() -> str:
    """Of the process group's keys: another one after a restart.

    torchrun's store keeps the addresses of processes that have ended (pytorch#135712). Each machine
    counts restarts for itself. The counts agree on one machine, and in `launch/node.py`, which uses
    the store of torchrun for a fixed set of machines only.
    """
    is_fixed = "1" in (
        os.environ.get("GROUP_WORLD_SIZE"),
        os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    )
    if is_fixed and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"default_pg/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return "default_pg"


def _store_error(reason: str) -> ConfigError:
    """Why there is no connection to the store of rank 0, and with which exit code."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in reason:
        message, remedy = f"{port} is in use on this machine", "choose another (--master-port)"
        error = ConfigError.at("MASTER_PORT", message, remedy)
    else:
        message = f"{address}:{port} cannot be reached"
        remedy = "check that the first node is up, its address, and that the port is open"
        error = ConfigError.at("MASTER_ADDR", message, remedy)
    # torchrun has connected to this address before it started this process, or has drawn a free
    # port for this start: it is another one in the next.
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        error.exit_code = EXIT_PEER_LOST
    return error


def _nccl_device() -> torch.device | None:
    """The GPU of this rank, which NCCL would otherwise guess from its first collective.

    With it, NCCL connects at once, and megatron-core's groups are split from this one instead of
    connected one by one.
    """
    return default_device() if torch.cuda.is_available() else None


def _check_environment() -> None:
    """Check that torchrun's variables are complete and every rank of this machine has a GPU."""
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if "RANK" in os.environ and missing:
        remedy = "start with torchrun, or unset RANK to run in one process"
        raise ConfigError.at("RANK", f"is set, but not {', '.join(missing)}", remedy)
    if not torch.cuda.is_available():
        return
    num_gpus = torch.cuda.device_count()
    # LOCAL_WORLD_SIZE as well as LOCAL_RANK: all local ranks must raise, not only those without a
    # GPU, or the others wait for them in the rendezvous.
    last = max(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    if last >= num_gpus:
        message = f"{last + 1} ranks on this machine, but {num_gpus} visible GPUs"
        remedy = f"start torchrun with --nproc-per-node {num_gpus}"
        raise ConfigError.at("LOCAL_WORLD_SIZE", message, remedy)


@contextmanager
def running_layout(layout: Layout, seed: int = 0) -> Iterator[None]:
    """Create megatron-core's process groups for a layout; destroy them at the end. Collective."""
    # megatron-core is imported only where a layout runs: other verbs join a world without it.
    from megatron_idpo.mcore.parallel.groups import start_layout, stop_layout

    start_layout(layout, seed)
    try:
        yield
    except BaseException:
        # Other ranks may not be here, or be lost: NCCL would wait for them.
        stop_layout(destroy_groups=False)
        raise
    stop_layout()


# --- failing together, and small collectives ---------------------------------------------------


@contextmanager
def raise_on_all_ranks(step: str) -> Iterator[None]:
    """Run a block on every rank; a `UserError` on any rank is raised on all of them.

    The block must contain no collective that a failing rank would skip. Collective: an all-gather
    of one small object at the end of the block. Unexpected errors (bugs) are not exchanged: they
    end this rank with their traceback, and torchrun ends the others.

    Args:
        step: what the block does; the prefix of the message on ranks that did not fail themselves.

    Raises:
        UserError: this rank's own error, or the first failing rank's, with the same type.
    """
    failure: UserError | None = None
    try:
        with doing(step):
            yield
    except UserError as error:
        failure = error
    # As strings: an exception with its traceback and cause may not be picklable.
    reason = None
    if failure is not None:
        reason = (type(failure).__name__, str(failure), failure.exit_code)
    with doing(f"waiting for the others after {step}"):
        reasons = all_gather_objects(reason)
    if failure is not None:
        raise failure
    for rank, other in enumerate(reasons):
        if other is not None:
            kind, message, exit_code = other
            raised = _ERROR_TYPES.get(kind, UserError)(f"{step} failed on rank {rank}: {message}")
            raised.exit_code = exit_code
            raise raised


def broadcast_from_rank0[Value](compute: Callable[[], Value]) -> Value:
    """The result of `compute` on rank 0, on every rank. Collective: a broadcast of an object."""
    result = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, src=0)
    return cast(Value, result[0])


def read_on_rank0[Value](step: str, read: Callable[[], Value]) -> Value:
    """What `read` returns on rank 0, on every rank. Collective: an all-gather and a broadcast.

    For small files that all ranks need: hundreds of them reading and parsing the same file take
    longer, and load the file system.

    Args:
        step: what is read; the prefix of the message on other ranks.
        read: its value can be pickled.

    Raises:
        UserError: on every rank, as `raise_on_all_ranks`.
    """
    values: list[Value] = []
    with raise_on_all_ranks(step):
        if dist.get_rank() == 0:
            values.append(read())
    return broadcast_from_rank0(lambda: values[0])


def all_gather_objects[Value](value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every rank's value, in rank order. Collective: an all-gather of one small object.

    Args:
        value: this rank's.
        group: of the ranks; None: the world.
    """
    values: list[Value | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return cast(list[Value], values)


def is_rank0() -> bool:
    """Whether this is rank 0, which prints, and writes files that are written once.

    True without a process group.
    """
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for every rank. Collective without data; forward only."""
    if backend() == "nccl":
        # Without device_ids NCCL guesses the device from the global rank, which can hang.
        dist.barrier(device_ids=[default_device().index])
    else:
        dist.barrier()


# --- stopping together ------------------------------------------------------------------------


class StopFlag:
    """Whether this process has received a stop signal, and which."""

    def __init__(self) -> None:
        """No signal yet."""
        self.signal: signal.Signals | None = None

    def handle(self, signum: int, frame: FrameType | None = None) -> None:
        """Signal handler: remember the signal."""
        self.signal = signal.Signals(signum)

    @property
    def stop_requested(self) -> bool:
        """Whether a stop signal has arrived."""
        return self.signal is not None


class RunStopped(Exception):
    """The work stopped on every rank after a stop signal; what was done is saved."""


@contextmanager
def catch_stop_signals() -> Iterator[StopFlag]:
    """Set a flag on a stop signal instead of ending the process, within the block.

    Python installs handlers in the main thread only: in another thread signals are the caller's.
    """
    stop_flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        _LOG.info("not in the main thread: stop signals (SIGTERM, SIGUSR1) are not handled")
        yield stop_flag
        return
    previous = {signum: signal.signal(signum, stop_flag.handle) for signum in STOP_SIGNALS}
    try:
        yield stop_flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
