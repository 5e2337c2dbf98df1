"""Joining the run's processes, and failing together."""

import time
from typing import Any

import pytest

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import CheckpointError, ConfigError, UserError

pytestmark = pytest.mark.distributed


def fail_on(ranks: list[int], error: Exception) -> tuple[str, str, list[str]]:
    """What this rank is told when some ranks fail, and that collectives work afterwards."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import all_gather_objects, raise_on_all_ranks

    message = ("", "")
    try:
        with raise_on_all_ranks("the step"):
            if dist.get_rank() in ranks:
                raise error
    except UserError as caught:
        message = (type(caught).__name__, str(caught))
    return *message, all_gather_objects(f"rank {dist.get_rank()}")


AFTERWARDS = ["rank 0", "rank 1", "rank 2"]


@pytest.mark.parametrize("error", [CheckpointError("broken"), ConfigError("broken")])
def test_a_rank_that_fails_alone_fails_them_all(error, workers):
    kind = type(error).__name__
    other = (kind, "the step failed on rank 1: broken", AFTERWARDS)
    assert workers.run(fail_on, 3, [1], error) == [other, (kind, "broken", AFTERWARDS), other]


def test_ranks_that_fail_tell_their_own_reason(workers):
    answers = workers.run(fail_on, 3, [0, 1, 2], CheckpointError("broken"))
    assert answers == [("CheckpointError", "broken", AFTERWARDS)] * 3


def test_nobody_fails(workers):
    assert workers.run(fail_on, 3, [], CheckpointError("broken")) == [("", "", AFTERWARDS)] * 3


def test_a_mistake_of_ours_is_not_exchanged(workers):
    with pytest.raises(ZeroDivisionError):
        workers.run(fail_on, 2, [0, 1], ZeroDivisionError("ours"))


def small_collectives() -> tuple[Any, ...]:
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import (
        all_gather_objects,
        barrier,
        broadcast_from_rank0,
        is_rank0,
    )

    barrier()
    rank = dist.get_rank()
    return broadcast_from_rank0(lambda: {"made on": rank}), all_gather_objects(rank * 2), is_rank0()


def test_small_collectives(workers):
    answers = workers.run(small_collectives, 3)
    assert answers == [({"made on": 0}, [0, 2, 4], rank == 0) for rank in range(3)]


def join_and_run() -> tuple[Any, ...]:
    """Joins the worker's world and a layout in it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout

    with distributed_world() as world:
        with running_layout(Layout(tensor=2)):
            tensor = parallel_state.get_tensor_model_parallel_world_size()
        stopped = not parallel_state.is_initialized()
    return world.rank, world.size, world.is_first, tensor, stopped, dist.is_initialized()


def test_a_world_that_exists_is_used_and_left_standing(workers):
    assert workers.run(join_and_run, 2) == [
        (0, 2, True, 2, True, True),
        (1, 2, False, 2, True, True),
    ]


def leave_and_join_alone() -> tuple[Any, ...]:
    import os

    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import distributed_world, is_rank0, running_layout

    dist.destroy_process_group()
    outside = is_rank0()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    with distributed_world() as world, running_layout(Layout()):
        inside = world.rank, world.size, dist.get_backend()
    return outside, inside, dist.is_initialized()


def test_a_plain_program_is_a_world_of_one(workers):
    assert workers.run(leave_and_join_alone, 1) == [(True, (0, 1, "gloo"), False)]


def fail_within_a_layout() -> tuple[bool, bool]:
    from megatron.core import parallel_state

    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout

    try:
        with distributed_world(), running_layout(Layout()):
            started = parallel_state.is_initialized()
            raise CheckpointError("broken")
    except CheckpointError:
        return started, parallel_state.is_initialized()


def test_a_layout_is_stopped_by_an_error(workers):
    assert workers.run(fail_within_a_layout, 1) == [(True, False)]


def test_failing_together_takes_no_time_out(workers):
    workers.run(fail_on, 2, [], CheckpointError("warm"))
    begin_s = time.monotonic()
    workers.run(fail_on, 2, [1], CheckpointError("broken"), timeout_s=30.0)
    assert time.monotonic() - begin_s < 30.0


def join_with(gpus: int, **environment: str) -> str:
    """What a plain program is told that has this environment and these GPUs."""
    import os
    from unittest import mock

    import torch
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import distributed_world

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch.cuda, "is_available", lambda: gpus > 0),
        mock.patch.object(torch.cuda, "device_count", lambda: gpus),
        pytest.raises(ConfigError) as message,
        distributed_world(),
    ):
        raise AssertionError("joined")
    return str(message.value)


def test_a_rank_of_no_world(workers):
    (message,) = workers.run(join_with, 1, 0, RANK="0")
    assert message.startswith(
        "RANK: is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with"
    )


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_more_ranks_than_gpus(name, workers):
    (message,) = workers.run(join_with, 1, 2, **{name: "3" if name == "LOCAL_RANK" else "4"})
    assert message.startswith(
        "LOCAL_WORLD_SIZE: 4 ranks on this machine, but 2 visible GPUs; start"
    )
