"""How sharded tensors get into megatron-core's `torch_dist` files and out of them again.

Through torch's own distributed checkpoints, as megatron-core does, but one tensor at a time, and
with errors that name file and tensor. megatron-core 0.19 writes through a writer made for saving in
the background: it clones every view of a larger tensor before the first byte is written, starts a
manager process that imports torch once more, tells of a failed write `error: <class 'OSError'>`,
and leaves the other ranks waiting if the first cannot write the metadata. It reads with two tensors
in memory beside the model, in an order of its own. The files are the same.

Not here: what is saved (`checkpoint/weights.py`), atomic directories (`checkpoint/directory.py`).
"""

import errno
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_idpo.checkpoint.dtype_checks import check_range
from megatron_idpo.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DirectSave(TorchDistSaveShardedStrategy):
    """A `dist_checkpointing` save strategy that writes at once, one tensor at a time."""

    def __init__(self, location: Path) -> None:
        """Args: what to call the directory in errors; it may be hidden until it is complete."""
        super().__init__()
        self._place = location

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Write every rank's main replicas. Collective.

        Args:
            sharded_state_dict: megatron-core's sharded tensors and objects, factories applied.
            checkpoint_dir: exists.

        Raises:
            CheckpointError: on every rank, when any of them could not write.
        """
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = _Planner(
            dedup_replicated_tensors=not self.keep_only_main_replica,
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        try:
            torch_checkpoint.save(
                mcore_to_pyt_state_dict(state, is_loading=False),
                storage_writer=Writer(checkpoint_dir, self._place),
                planner=planner,
            )
        except CheckpointException as failed:  # no Exception, but BaseException
            raise failure_to_write(failed, self._place) from failed


def read_into(tensors: Sequence[ShardedTensor], directory: Path) -> None:
    """Fill this rank's sharded tensors from a checkpoint, in their own memory. Not collective.

    Args:
        tensors: of any layout; shapes as in the checkpoint, but where `allow_shape_mismatch` lets
            the checkpoint's be longer (cut off) or shorter (filled up with zeros).
        directory: a checkpoint that `checkpoint/contents.py` has looked at.

    Raises:
        CheckpointError: a file is damaged, or a value too large for the format of its tensor.
    """
    by_key: dict[str, list[ShardedTensor]] = {}
    for tensor in tensors:
        by_key.setdefault(tensor.key, []).append(tensor)
    planner = _LoadPlanner(
        directory,
        shapes_validation_sharded_tensors=[one for one in tensors if not one.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={
            one.key: one for one in tensors if one.allow_shape_mismatch
        },
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    try:
        torch_checkpoint.load(
            mcore_to_pyt_state_dict(by_key, is_loading=True),
            storage_reader=Reader(directory),
            planner=planner,
            no_dist=True,
        )
    except CheckpointException as failed:
        raise first_failure(failed) from failed


class Reader(FileSystemReader):
    """Reads one tensor after the other and lets go of it; tells damage with file and tensor."""

    def __init__(self, directory: Path, *, verify: bool = False) -> None:
        """Say what is read how.

        Args:
            directory: the checkpoint.
            verify: compare what is read with the checksums in the files, which torch does not.
        """
        super().__init__(directory)
        self._verified: set[MetadataIndex] | None = set() if verify else None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill everything planned.

        A tensor is read whole before it is copied. The largest, embedding and output layer, come
        first, while the memory of the others is still untouched, so that this does not add to the
        peak.
        """

        def size(item: ReadItem) -> int:
            return prod(item.lengths)

        for item in sorted(plan.items, key=size, reverse=True):
            try:
                self._verify(item.storage_index)
                super().read_data(replace(plan, items=[item]), planner)
            except CheckpointError:
                raise
            except Exception as error:  # whatever unzipping and unpickling find
                path = Path(self.path) / self.storage_data[item.storage_index].relative_path
                # Not torch's words: it advises to unpickle whatever is there.
                reason = getattr(error, "strerror", None) or "the file is damaged"
                raise CheckpointError.at(
                    str(path),
                    f"tensor {item.storage_index.fqn!r} cannot be read ({reason})",
                    "copy the checkpoint here again",
                ) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _verify(self, stored: MetadataIndex) -> None:
        """What `torch.save` wrote is a zip archive with a checksum of every part."""
        if self._verified is None or stored in self._verified:
            return
        where = self.storage_data[stored]
        with open(Path(self.path) / where.relative_path, "rb") as file:
            with ZipFile(_Part(file, where.offset, where.length)) as archive:
                if (part := archive.testzip()) is not None:
                    raise BadZipFile(part)
        self._verified.add(stored)


class _Part(io.RawIOBase):
    """A part of a file as a file, for unzipping; torch's own cannot seek from its end."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        left = self._length - self._position
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content


class _LoadPlanner(MCoreLoadPlanner):
    """Refuses values that have become infinite on their way into the model's format."""

    def __init__(self, location: Path, **options: Any) -> None:
        super().__init__(**options)
        self._place = location

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        name = read_item.storage_index.fqn
        stored = self.metadata.state_dict_metadata[name].properties.dtype
        check_range(str(self._place), name, tensor, stored)


class _Planner(MCoreSavePlanner):
    """Remembers which tensor is being written, for the error message."""

    writing = "the plan"

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.writing = f"tensor {write_item.index.fqn!r}"
        return super().resolve_data(write_item)


class Writer(FileSystemWriter):
    """Tells failures of the disk with their file and tensor.

    Which tensor that is, its planner says in an attribute `writing`.
    """

    def __init__(self, directory: Path, location: Path, *, from_host: bool = False) -> None:
        """Say what is written where.

        Args:
            directory: where to write.
            location: what to call that in errors.
            from_host: whether all tensors are in the host's memory. Then the GPU is not touched, on
                which a new thread would first have to find its own device.
        """
        super().__init__(directory)
        if from_host:
            self.per_thread_copy_ahead = 0
        self._place = location

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:  # torch.save makes the one into the other
            file = f"{plan.storage_data.prefix}0.distcp"
            what: str = getattr(planner, "writing")  # noqa: B009 - no attribute of SavePlanner
            raise _failed(self._place / file, what, error) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, on one rank."""
        try:
            super().finish(metadata, results)
        except OSError as error:
            raise _failed(self._place / ".metadata", "the list of tensors", error) from error


def _failed(path: Path, what: str, error: BaseException) -> CheckpointError:
    """A failure of the disk; torch hides the system's own error among the causes of others."""
    system = error
    while not isinstance(system, OSError):
        cause = system.__cause__ or system.__context__
        if cause is None:
            reason = str(error).split("\n", 1)[0]
            return CheckpointError.at(str(path), f"{what} cannot be written: {reason}")
        system = cause
    if system.errno in _FULL:
        return CheckpointError.at(str(path), f"the disk or quota is full: no room for {what}")
    return CheckpointError.at(str(path), f"{what} cannot be written: {system.strerror}")


def first_failure(failed: CheckpointException) -> BaseException:
    """What the first failing rank failed with, in torch's account of all ranks."""
    _, (error, _) = min(failed.failures.items())
    return error


def failure_to_write(failed: CheckpointException, location: Path) -> BaseException:
    """What a rank could not write: for the user if it is theirs to mend, else the error as it is.

    Args:
        failed: torch's account of all ranks.
        location: what to name where the system did not say which file it refused.
    """
    error = first_failure(failed)
    if isinstance(error, OSError):
        return CheckpointError.at(str(location), f"cannot be written: {error.strerror}")
    return error
