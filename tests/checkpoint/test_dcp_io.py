"""Writing and reading `torch_dist` files; failures are raised with file and tensor on all ranks."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_idpo.checkpoint import dcp_io
from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, CheckpointError

pytestmark = pytest.mark.distributed


def tensors(rank: int, size: int):
    """One tensor split by rows over the ranks, and one replicated."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rows = torch.arange(4.0).view(1, 4) + 10 * rank
    return {
        "rows": ShardedTensor.from_rank_offsets("rows", rows, (0, rank, size), replica_id=0),
        "same": ShardedTensor.from_rank_offsets("same", torch.ones(3), replica_id=rank),
    }


def write_and_read(directory: str, failing_rank: int | None, error: Callable[[], Exception]):
    """This rank's values after a save and a load, or its error."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import filesystem

    from megatron_idpo.checkpoint.dcp_io import DirectSave
    from megatron_idpo.checkpoint.dcp_planner import read_chunks
    from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout(tensor=dist.get_world_size()))
    rank, size = dist.get_rank(), dist.get_world_size()
    state = tensors(rank, size)
    side_effect = error() if rank == failing_rank else filesystem._write_item
    try:
        with mock.patch.object(filesystem, "_write_item", side_effect=side_effect):
            dist_checkpointing.save(state, directory, DirectSave(Path("shown")))
    except BaseException as message:
        return type(message).__name__, str(message)
    fresh = tensors(rank, size)
    for tensor in fresh.values():
        tensor.data.zero_()
    read_chunks([TensorChunk.of(tensor) for tensor in fresh.values()], Path(directory))
    return fresh["rows"].data.tolist(), fresh["same"].data.tolist()


def test_tensors_round_trip(workers, tmp_path):
    answers = workers.run(write_and_read, 2, str(tmp_path), None, ValueError)
    assert answers == [([[0, 1, 2, 3]], [1, 1, 1]), ([[10, 11, 12, 13]], [1, 1, 1])]


def system_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def within_torch_save(code: int) -> RuntimeError:
    """How torch.save raises the error of its file."""
    outer = RuntimeError("unexpected pos 64 vs 0\nat zip.cc")
    outer.__context__ = system_error(code)
    return outer


FULL = (
    "the disk or quota is full: no space for tensor 'rows'; "
    "free some space, or name a path on another file system"
)
FAILURES = {
    "full": (partial(system_error, errno.ENOSPC), FULL),
    "quota": (partial(system_error, errno.EDQUOT), FULL),
    "full within torch.save": (partial(within_torch_save, errno.ENOSPC), FULL),
    "hardware": (
        partial(system_error, errno.EIO),
        "tensor 'rows' cannot be written: Input/output error; "
        "the storage fails: check it, or name a path on another one",
    ),
    "torch.save": (
        partial(RuntimeError, "no reason\nat zip.cc"),
        "tensor 'rows' cannot be written: no reason",
    ),
}


@pytest.mark.parametrize(("error", "message"), FAILURES.values(), ids=FAILURES)
def test_failed_write_is_the_same_error_on_all_ranks(error, message, workers, tmp_path):
    (tmp_path / "out").mkdir()
    answers = workers.run(write_and_read, 2, str(tmp_path / "out"), 1, error)
    assert answers == [("CheckpointError", f"shown/__1_0.distcp: {message}")] * 2


@pytest.mark.parametrize(
    ("code", "exit_code"), [(errno.EIO, EXIT_PEER_LOST), (errno.ENOSPC, EXIT_USER_ERROR)]
)
def test_storage_that_fails_is_not_an_error_of_the_user(code, exit_code):
    for system in (system_error(code), within_torch_save(code)):
        assert dcp_io._write_error(Path("x"), "tensor 'rows'", system).exit_code == exit_code


def test_unwritable_directory_is_reported(workers, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"^shown: cannot be written: "):
        workers.run(write_below_a_file, 1, str(tmp_path / "file" / "out"))


def write_below_a_file(directory: str) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_idpo.checkpoint.dcp_io import DirectSave
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    tensor = ShardedTensor.from_rank_offsets("same", torch.ones(3), replica_id=0)
    DirectSave(Path("shown")).save({"same": tensor}, Path(directory))


def test_internal_error_is_not_translated(workers, tmp_path):
    (answer,) = workers.run(write_and_read, 1, str(tmp_path), 0, partial(ZeroDivisionError, "ours"))
    assert answer == ("ZeroDivisionError", "ours")
