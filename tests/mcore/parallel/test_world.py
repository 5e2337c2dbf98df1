"""The processes of a run: joining, failing together, small collectives, stop signals."""

import os
import signal
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_idpo.cli.errors import is_lost_peer
from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import (
    EXIT_PEER_LOST,
    EXIT_USER_ERROR,
    CheckpointError,
    ConfigError,
    UserError,
)
from megatron_idpo.mcore.parallel import world
from megatron_idpo.mcore.parallel.world import STOP_SIGNALS, catch_stop_signals

# --- failing together, and small collectives ---------------------------------------------------


def fail_on(ranks: list[int], error: Exception) -> tuple[str, str, list[str]]:
    """The error on this rank when some ranks fail, and the result of a collective afterwards."""
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


@pytest.mark.distributed
@pytest.mark.parametrize("error", [CheckpointError("broken"), ConfigError("broken")])
def test_an_error_on_one_rank_is_raised_on_all(error, workers):
    kind = type(error).__name__
    other = (kind, "the step failed on rank 1: broken", AFTERWARDS)
    assert workers.run(fail_on, 3, [1], error) == [other, (kind, "broken", AFTERWARDS), other]


@pytest.mark.distributed
def test_a_failing_rank_raises_its_own_error(workers):
    errors = workers.run(fail_on, 3, [0, 1, 2], CheckpointError("broken"))
    assert errors == [("CheckpointError", "broken", AFTERWARDS)] * 3


def test_the_exit_code_of_another_ranks_error_is_kept(monkeypatch):
    reasons = [None, ("ConfigError", "the storage fails", EXIT_PEER_LOST)]
    monkeypatch.setattr(world, "all_gather_objects", lambda _: reasons)
    with pytest.raises(ConfigError) as raised, world.raise_on_all_ranks("writing"):
        pass
    assert raised.value.exit_code == EXIT_PEER_LOST


@pytest.mark.distributed
def test_no_error_is_raised_if_no_rank_fails(workers):
    assert workers.run(fail_on, 3, [], CheckpointError("broken")) == [("", "", AFTERWARDS)] * 3


@pytest.mark.distributed
def test_an_unexpected_error_is_not_exchanged(workers):
    with pytest.raises(ZeroDivisionError):
        workers.run(fail_on, 2, [0, 1], ZeroDivisionError("a bug"))


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
    return broadcast_from_rank0(lambda: {"rank": rank}), all_gather_objects(rank * 2), is_rank0()


@pytest.mark.distributed
def test_small_collectives(workers):
    results = workers.run(small_collectives, 3)
    assert results == [({"rank": 0}, [0, 2, 4], rank == 0) for rank in range(3)]


# --- joining ----------------------------------------------------------------------------------


def join_and_run() -> tuple[Any, ...]:
    """Join the worker's world and run a layout in it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout

    with distributed_world() as world:
        with running_layout(Layout(tensor=2)):
            tensor = parallel_state.get_tensor_model_parallel_world_size()
        stopped = not parallel_state.is_initialized()
    return world.rank, world.size, world.is_first, tensor, stopped, dist.is_initialized()


@pytest.mark.distributed
def test_an_existing_process_group_is_used_and_kept(workers):
    assert workers.run(join_and_run, 2) == [
        (0, 2, True, 2, True, True),
        (1, 2, False, 2, True, True),
    ]


def leave_and_join_alone() -> tuple[Any, ...]:
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import distributed_world, is_rank0, running_layout

    dist.destroy_process_group()
    outside = is_rank0()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    with distributed_world() as world, running_layout(Layout()):
        inside = world.rank, world.size, dist.get_backend()
    return outside, inside, dist.is_initialized()


@pytest.mark.distributed
def test_without_torchrun_the_world_has_one_rank(workers):
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


@pytest.mark.distributed
def test_an_error_stops_the_layout(workers):
    assert workers.run(fail_within_a_layout, 1) == [(True, False)]


def join_with(gpus: int, **environment: str) -> str:
    """The error of a program with this environment and this number of GPUs."""
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
        pytest.raises(ConfigError) as error,
        distributed_world(),
    ):
        raise AssertionError("joined")
    return str(error.value)


@pytest.mark.distributed
def test_an_incomplete_torchrun_environment_is_rejected(workers):
    (message,) = workers.run(join_with, 1, 0, RANK="0")
    assert message.startswith(
        "RANK: is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with"
    )


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_more_local_ranks_than_gpus_is_rejected(name, workers):
    (message,) = workers.run(join_with, 1, 2, **{name: "3" if name == "LOCAL_RANK" else "4"})
    assert message.startswith(
        "LOCAL_WORLD_SIZE: 4 ranks on this machine, but 2 visible GPUs; start"
    )


UNREACHABLE = dist.DistNetworkError("The client socket has failed to connect to node1:29500")
IN_USE = dist.DistNetworkError("The server socket has failed to listen (EADDRINUSE)")


@pytest.fixture
def two_ranks(monkeypatch):
    """The environment of a rank that has not joined yet."""
    for name in (
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "GROUP_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("agent_store", "code"),
    [(None, EXIT_USER_ERROR), ("True", EXIT_PEER_LOST), ("False", EXIT_PEER_LOST)],
)
@pytest.mark.parametrize(
    ("error", "message"),
    [(UNREACHABLE, "MASTER_ADDR: node1:29500 cannot"), (IN_USE, "MASTER_PORT: 29500 is in use")],
)
def test_an_address_that_torchrun_knows_is_no_error_of_the_user(
    two_ranks, monkeypatch, agent_store, code, error, message
):
    """torchrun has just connected to it, or has drawn the port: a restart helps."""
    if agent_store is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent_store)
    monkeypatch.setattr(world, "rendezvous", mock.Mock(side_effect=error))
    with pytest.raises(ConfigError, match=message) as raised:
        world._rendezvous(timedelta(seconds=1))
    assert raised.value.exit_code == code


def test_a_store_that_ends_while_others_join_is_a_lost_process(two_ranks, monkeypatch):
    lost = dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")
    monkeypatch.setattr(world, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=lost))
    with pytest.raises(dist.DistNetworkError) as raised:
        world._rendezvous(timedelta(seconds=1))
    assert is_lost_peer(raised.value)


@pytest.mark.parametrize(
    ("launcher", "prefix"),
    [
        ({}, "default_pg"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}, "default_pg/2"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "3"}, "default_pg"),
        (
            {
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GROUP_WORLD_SIZE": "3",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
            "default_pg/2",
        ),
        (
            {
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                "GROUP_WORLD_SIZE": "3",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
            "default_pg",
        ),
    ],
)
def test_a_restart_does_not_read_what_processes_before_it_have_stored(
    two_ranks, monkeypatch, launcher, prefix
):
    """Where all machines count the same restarts."""
    for name, value in {"TORCHELASTIC_RESTART_COUNT": "2", **launcher}.items():
        monkeypatch.setenv(name, value)
    store, joined = dist.HashStore(), []
    monkeypatch.setattr(world, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **given: joined.append(given))
    world._rendezvous(timedelta(seconds=1))
    joined[0]["store"].set("address", "own")
    assert store.get(f"{prefix}/address") == b"own"


# --- stop signals -----------------------------------------------------------------------------


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_stop_signal_sets_the_flag(signum: signal.Signals) -> None:
    with catch_stop_signals() as stop_flag:
        assert not stop_flag.stop_requested
        os.kill(os.getpid(), signum)
        assert stop_flag.stop_requested and stop_flag.signal == signum


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with catch_stop_signals():
        assert [signal.getsignal(signum) for signum in STOP_SIGNALS] != before
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before
