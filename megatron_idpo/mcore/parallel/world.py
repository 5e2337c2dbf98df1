"""The processes of a run: joining them, and making them fail together.

Started by torchrun, a verb joins the world that the environment describes; started as a plain
program it is a world of one. `raise_on_all_ranks` turns an error on any rank into the same error
on all, because a rank that stops alone leaves the others waiting in a collective until a time-out.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from megatron_idpo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    UserError,
)
from megatron_idpo.mcore.cpu.redirect import backend, default_device, redirect_cuda_to_cpu
from megatron_idpo.mcore.megatron_warnings import quiet_megatron
from megatron_idpo.mcore.parallel.layout import Layout

_RENDEZVOUS = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch needs beside `RANK` to find the other processes."""

_KINDS = {
    kind.__name__: kind
    for kind in (ConfigError, DataError, CheckpointError, TrainingError, UserError)
}


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks to the user."""
        return self.rank == 0


@contextmanager
def joined_world(timeout_s: float = 1800.0) -> Iterator[World]:
    """Join torchrun's world, or make one of this process alone; leave it at the end.

    A world that exists already (a test's, a user's own script's) is used and left standing.
    Everything of megatron-core that asks for CUDA is redirected first where there is none, and
    what it says about itself meanwhile is kept from the user (`mcore/quiet.py`).

    Args:
        timeout_s: how long a collective may wait for a rank, in seconds.

    Raises:
        ConfigError: the environment describes half a world, or more ranks here than GPUs.
    """
    has_gpu = not redirect_cuda_to_cpu()
    with quiet_megatron(has_gpu=has_gpu), _process_group(timeout_s):
        yield World(dist.get_rank(), dist.get_world_size())


@contextmanager
def _process_group(timeout_s: float) -> Iterator[None]:
    """A process group of our own, unless there is one."""
    if dist.is_initialized():
        yield
        return
    _check_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        _rendezvous(timedelta(seconds=timeout_s))
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> None:
    """Meet the other processes where the environment says."""
    try:
        dist.init_process_group(backend(), timeout=timeout)
    except dist.DistNetworkError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            message, remedy = f"{port} is in use on this machine", "choose another (--master-port)"
            raise ConfigError.at("MASTER_PORT", message, remedy) from error
        message = f"{address}:{port} cannot be reached"
        remedy = "is the first node up, and is that its address and an open port?"
        raise ConfigError.at("MASTER_ADDR", message, remedy) from error


def _check_environment() -> None:
    """What torchrun sets is there as a whole, and every rank of this machine has a GPU."""
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if "RANK" in os.environ and missing:
        remedy = "start with torchrun, or unset RANK to run in one process"
        raise ConfigError.at("RANK", f"is set, but not {', '.join(missing)}", remedy)
    if not torch.cuda.is_available():
        return
    num_gpus = torch.cuda.device_count()
    # The number of local ranks, so that all of them refuse rather than those without a GPU alone.
    last = max(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    if last >= num_gpus:
        message = f"{last + 1} ranks on this machine, but {num_gpus} visible GPUs"
        remedy = f"start torchrun with --nproc-per-node {num_gpus}"
        raise ConfigError.at("LOCAL_WORLD_SIZE", message, remedy)


@contextmanager
def running(layout: Layout, seed: int = 0) -> Iterator[None]:
    """megatron-core's process groups for a layout, taken down again at the end. Collective."""
    layout.start(seed)
    try:
        yield
    finally:
        layout.stop()


@contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
    """Run a block on every rank; if it fails for a user's reason on any, it fails on all.

    The block must contain no collective that a failing rank would skip. Collective: an all-gather
    of one small object at the end of the block. Unexpected errors (bugs) are not exchanged: they
    end this rank with their traceback and torchrun ends the others.

    Args:
        what: the step, to be named on ranks that are told of another rank's failure.

    Raises:
        UserError: this rank's own error, or the first failing rank's, of the same kind.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    reason = None if failure is None else (type(failure).__name__, str(failure))
    everyone = gathered(reason)
    if failure is not None:
        raise failure
    for rank, other in enumerate(everyone):
        if other is not None:
            kind, message = other
            raise _KINDS.get(kind, UserError)(f"{what} failed on rank {rank}: {message}")


def from_first[Value](make: Callable[[], Value]) -> Value:
    """What the first rank makes, on every rank. Collective: a broadcast of one small object."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return cast(Value, made[0])


def gathered[Value](mine: Value) -> list[Value]:
    """Every rank's value, in rank order. Collective: an all-gather of one small object."""
    everyone: list[Value | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return cast(list[Value], everyone)


def is_first_rank() -> bool:
    """Whether this is the rank that speaks to the user and writes what is written once.

    A process outside of any world is one.
    """
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for every rank. Collective without data; forward only."""
    if backend() == "nccl":
        dist.barrier(device_ids=[default_device().index])
    else:
        dist.barrier()
