"""The processes of a run: joining them, and making them fail together.

Started by torchrun, a verb joins the world that the environment describes; started as a plain
program it is a world of one. `agreeing` turns an error on any rank into the same error on all,
because a rank that stops alone leaves the others waiting in a collective until a time-out.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from megatron_idpo.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_idpo.mcore.cpu import backend, default_device, redirect_cuda_to_cpu
from megatron_idpo.mcore.layout import Layout
from megatron_idpo.mcore.quiet import quiet_megatron

_KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, UserError)}


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
    """
    redirect_cuda_to_cpu()
    with quiet_megatron(), _process_group(timeout_s):
        yield World(dist.get_rank(), dist.get_world_size())


@contextmanager
def _process_group(timeout_s: float) -> Iterator[None]:
    """A process group of our own, unless there is one."""
    if dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timedelta(seconds=timeout_s))
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def running(layout: Layout, seed: int = 0) -> Iterator[None]:
    """megatron-core's process groups for a layout, taken down again at the end. Collective."""
    layout.start(seed)
    try:
        yield
    finally:
        layout.stop()


@contextmanager
def agreeing(what: str) -> Iterator[None]:
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
    told = None if failure is None else (type(failure).__name__, str(failure))
    everyone = gathered(told)
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
