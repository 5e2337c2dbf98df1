"""Writing and reading `torch_dist` files: what a failing system is told as, and on which ranks."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.layout import Layout

pytestmark = pytest.mark.distributed


def tensors(rank: int, size: int):
    """A tensor cut into rows, one per rank, and one replicated."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rows = torch.arange(4.0).view(1, 4) + 10 * rank
    return {
        "rows": ShardedTensor.from_rank_offsets("rows", rows, (0, rank, size), replica_id=0),
        "same": ShardedTensor.from_rank_offsets("same", torch.ones(3), replica_id=rank),
    }


def write_and_read(directory: str, failing_rank: int | None, error: Callable[[], Exception]):
    """Rows of all ranks, or what this rank was told."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import filesystem

    from megatron_idpo.checkpoint.dcp_io import DirectSave, read_into

    Layout(tensor=dist.get_world_size()).start()
    rank, size = dist.get_rank(), dist.get_world_size()
    state = tensors(rank, size)
    side_effect = error() if rank == failing_rank else filesystem._write_item
    try:
        with mock.patch.object(filesystem, "_write_item", side_effect=side_effect):
            dist_checkpointing.save(state, directory, DirectSave(Path("shown")))
    except BaseException as message:
        return type(message).__name__, str(message)
    fresh = tensors(rank, size)
    for one in fresh.values():
        one.data.zero_()
    read_into(list(fresh.values()), Path(directory))
    return fresh["rows"].data.tolist(), fresh["same"].data.tolist()


def test_what_is_written_is_read(workers, tmp_path):
    answers = workers.run(write_and_read, 2, str(tmp_path), None, ValueError)
    assert answers == [([[0, 1, 2, 3]], [1, 1, 1]), ([[10, 11, 12, 13]], [1, 1, 1])]


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def within_torch_save(number: int) -> RuntimeError:
    """torch.save hands on what its file raised like this."""
    outer = RuntimeError("unexpected pos 64 vs 0\nat zip.cc")
    outer.__context__ = system_error(number)
    return outer


FULL = "the disk or quota is full: no room for tensor 'rows'"
FAILURES = {
    "full": (partial(system_error, errno.ENOSPC), FULL),
    "quota": (partial(system_error, errno.EDQUOT), FULL),
    "full within torch.save": (partial(within_torch_save, errno.ENOSPC), FULL),
    "hardware": (
        partial(system_error, errno.EIO),
        "tensor 'rows' cannot be written: Input/output error",
    ),
    "torch.save": (
        partial(RuntimeError, "no reason\nat zip.cc"),
        "tensor 'rows' cannot be written: no reason",
    ),
}


@pytest.mark.parametrize(("error", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failed_write_is_told_alike_on_all_ranks(error, message, workers, tmp_path):
    (tmp_path / "out").mkdir()
    answers = workers.run(write_and_read, 2, str(tmp_path / "out"), 1, error)
    assert answers == [("CheckpointError", f"shown/__1_0.distcp: {message}")] * 2


def test_a_directory_that_is_gone(workers, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"^shown: cannot be written: "):
        workers.run(write_below_a_file, 1, str(tmp_path / "file" / "out"))


def write_below_a_file(directory: str) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_idpo.checkpoint.dcp_io import DirectSave

    Layout().start()
    one = ShardedTensor.from_rank_offsets("same", torch.ones(3), replica_id=0)
    DirectSave(Path("shown")).save({"same": one}, Path(directory))


def test_a_mistake_of_ours_stays_what_it_is(workers, tmp_path):
    (answer,) = workers.run(write_and_read, 1, str(tmp_path), 0, partial(ZeroDivisionError, "ours"))
    assert answer == ("ZeroDivisionError", "ours")
