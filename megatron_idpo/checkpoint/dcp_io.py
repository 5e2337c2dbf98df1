"""How sharded tensors get into megatron-core's `torch_dist` files and out of them.

Through torch.distributed.checkpoint (DCP), as in megatron-core, but one tensor at a time and with
errors that name file and tensor. The files are the same. megatron-core 0.19

* writes through a writer for background saving: it clones every view of a larger tensor before the
  first byte is written and starts a manager process that imports torch again;
* reports a failed write as `error: <class 'OSError'>`, and hangs the other ranks if the first one
  cannot write the metadata;
* reads with two tensors in memory in addition to the model.

What is saved is in `checkpoint/weights.py` and `checkpoint/training_state.py`.
"""

import errno
import io
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
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

from megatron_idpo.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DirectSave(TorchDistSaveShardedStrategy):
    """A `dist_checkpointing` save strategy that writes immediately, one tensor at a time."""

    def __init__(self, location: Path) -> None:
        """Args: the directory's name in errors; its real name may be a hidden one."""
        super().__init__()
        self._location = location

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Writes every rank's main replicas. Collective.

        Args:
            sharded_state_dict: megatron-core's sharded tensors and objects, factories applied.
            checkpoint_dir: exists.

        Raises:
            CheckpointError: on every rank, if any of them could not write.
        """
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        planner = _SavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica,
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        try:
            torch_checkpoint.save(
                mcore_to_pyt_state_dict(state, is_loading=False),
                storage_writer=Writer(checkpoint_dir, self._location),
                planner=planner,
            )
        except CheckpointException as failed:  # derives from BaseException, not from Exception
            raise write_failure(failed, self._location) from failed


class Reader(FileSystemReader):
    """Reads one tensor after the other and releases it; reports damage with file and tensor."""

    def __init__(self, directory: Path, *, verify: bool = False) -> None:
        """Opens nothing yet.

        Args:
            directory: the checkpoint.
            verify: compare the data with the checksums in the files, which torch does not.
        """
        super().__init__(directory)
        self._verified: set[MetadataIndex] | None = set() if verify else None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills everything in the plan.

        A stored tensor is read completely before it is copied. The largest ones, embedding and
        output layer, are read first, while the memory of the others has not been touched yet, so
        that the buffer does not add to the peak.
        """

        def size(item: ReadItem) -> int:
            return prod(item.lengths)

        for item in sorted(plan.items, key=size, reverse=True):
            try:
                self._verify(item.storage_index)
                super().read_data(replace(plan, items=[item]), planner)
            except CheckpointError:
                raise
            except Exception as error:  # any error of unzipping and unpickling
                path = Path(self.path) / self.storage_data[item.storage_index].relative_path
                # torch's message is not shown: it advises to unpickle untrusted data.
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
        """Checks the CRC of each part of the zip archive that `torch.save` wrote."""
        if self._verified is None or stored in self._verified:
            return
        info = self.storage_data[stored]
        with open(Path(self.path) / info.relative_path, "rb") as file:
            file.seek(info.offset)
            # In memory, as torch holds it too when it reads the tensor afterwards.
            section = io.BytesIO(file.read(info.length))
        with ZipFile(section) as archive:
            if (part := archive.testzip()) is not None:
                raise BadZipFile(part)
        self._verified.add(stored)


class _SavePlanner(MCoreSavePlanner):
    """Records which tensor is being written, for errors."""

    writing = "the plan"

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.writing = f"tensor {write_item.index.fqn!r}"
        return super().resolve_data(write_item)


class Writer(FileSystemWriter):
    """Reports failed writes with file and tensor.

    The planner's attribute `writing` says which tensor is being written.
    """

    def __init__(self, directory: Path, location: Path, *, from_host: bool = False) -> None:
        """Opens nothing yet.

        Args:
            directory: where to write.
            location: its name in errors.
            from_host: whether all tensors are in CPU memory. The GPU is not used then: a new thread
                would have to select its device first.
        """
        super().__init__(directory)
        if from_host:
            self.per_thread_copy_ahead = 0
        self._location = location

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file."""
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:  # torch.save turns OSError into RuntimeError
            file = f"{plan.storage_data.prefix}0.distcp"
            content: str = getattr(planner, "writing")  # noqa: B009 - not in SavePlanner
            raise _write_error(self._location / file, content, error) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes `.metadata`; on one rank."""
        try:
            super().finish(metadata, results)
        except OSError as error:
            content = "the list of tensors"
            raise _write_error(self._location / ".metadata", content, error) from error


def _write_error(path: Path, content: str, error: BaseException) -> CheckpointError:
    """The error for a failed write; torch hides the system's error in the chain of causes."""
    system = error
    while not isinstance(system, OSError):
        cause = system.__cause__ or system.__context__
        if cause is None:
            reason = str(error).split("\n", 1)[0]
            return CheckpointError.at(str(path), f"{content} cannot be written: {reason}")
        system = cause
    if system.errno in _FULL:
        return CheckpointError.at(str(path), f"the disk or quota is full: no space for {content}")
    return CheckpointError.at(str(path), f"{content} cannot be written: {system.strerror}")


def first_failure(failed: CheckpointException) -> BaseException:
    """The error of the first failing rank."""
    _, (error, _) = min(failed.failures.items())
    return error


def write_failure(failed: CheckpointException, location: Path) -> BaseException:
    """The error of the first rank that could not write; a `CheckpointError` if the disk failed.

    Args:
        failed: DCP's collection of all ranks' errors.
        location: named if the system's error names no file.
    """
    error = first_failure(failed)
    if isinstance(error, OSError):
        return CheckpointError.at(str(location), f"cannot be written: {error.strerror}")
    return error
