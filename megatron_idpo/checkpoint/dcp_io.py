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
from collections.abc import Buffer
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import IO, Any
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
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
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

from megatron_idpo.checkpoint.contents import Contents
from megatron_idpo.checkpoint.dcp_metadata import read_dcp_metadata
from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.checksums import CHANGED, Checksum

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DirectSave(TorchDistSaveShardedStrategy):
    """A `dist_checkpointing` save strategy that writes immediately, one tensor at a time."""

    def __init__(self, location: Path) -> None:
        """Args: the directory's name in errors; its real name may be a hidden one."""
        super().__init__()
        self._location = location
        self.pieces: dict[str, dict[str, str]] = {}
        """On rank 0, after `save`: the checksums of what all ranks wrote (`contents.py`)."""

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
        writer = Writer(checkpoint_dir, self._location)
        try:
            torch_checkpoint.save(
                mcore_to_pyt_state_dict(state, is_loading=False),
                storage_writer=writer,
                planner=planner,
            )
        except CheckpointException as failed:  # derives from BaseException, not from Exception
            raise write_failure(failed, self._location) from failed
        self.pieces = writer.pieces


class Reader(FileSystemReader):
    """Reads one tensor after the other and releases it; reports damage with file and tensor.

    Everything is compared with its checksum before it is deserialized: torch compares nothing.
    """

    def __init__(
        self, directory: Path, contents: Contents | None, metadata: Metadata | None = None
    ) -> None:
        """Opens nothing yet.

        Args:
            directory: the checkpoint.
            contents: its checksums; without them, the CRC in the archives are compared.
            metadata: its list of tensors; None reads it.
        """
        super().__init__(directory)
        self._metadata = metadata
        self._contents = contents
        self._verified: set[MetadataIndex] = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list of tensors; torch would unpickle it without limits."""
        return self._metadata or read_dcp_metadata(Path(self.path))

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
                    self._remedy,
                ) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def _remedy(self) -> str:
        contents = self._contents
        return "copy the checkpoint here again" if contents is None else contents.remedy

    def _verify(self, stored: MetadataIndex) -> None:
        """Compares a stored piece of a tensor; the first time that it is read."""
        if stored in self._verified:
            return
        info = self.storage_data[stored]
        path = Path(self.path) / info.relative_path
        with path.open("rb", buffering=0) as file:
            if self._contents is None:
                _check_archive(file, info.offset, info.length)
            elif not self._contents.is_unchanged(
                file, info.relative_path, info.offset, info.length
            ):
                message = f"{CHANGED} (in tensor {stored.fqn!r})"
                raise CheckpointError.at(str(path), message, self._remedy)
        self._verified.add(stored)


def _check_archive(file: IO[bytes], offset: int, num_bytes: int) -> None:
    """Checks the CRC of each part of the zip archive that `torch.save` wrote."""
    with ZipFile(_Section(file, offset, num_bytes)) as archive:
        if (part := archive.testzip()) is not None:
            raise BadZipFile(part)


class _Section(io.RawIOBase):
    """A part of a file as a file, so that it need not be in memory."""

    def __init__(self, file: IO[bytes], offset: int, num_bytes: int) -> None:
        self._file, self._offset, self._num_bytes = file, offset, num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if start + position < 0:  # as of a real file; zipfile relies on it
            raise OSError(errno.EINVAL, "Invalid argument")
        self._position = start + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer)[: max(self._num_bytes - self._position, 0)]
        self._file.seek(self._offset + self._position)
        count: int = self._file.readinto(target)  # type: ignore[attr-defined]
        self._position += count
        return count


class _SavePlanner(MCoreSavePlanner):
    """Records which tensor is being written, for errors."""

    writing = "the plan"

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.writing = f"tensor {write_item.index.fqn!r}"
        return super().resolve_data(write_item)


@dataclass(frozen=True)
class _CheckedResult(WriteResult):
    """What DCP sends to rank 0 about a written piece, with its checksum."""

    checksum: str


class _CheckedStream:
    """What one piece of a tensor is written through, on its way to the rank's file."""

    def __init__(self, file: io.IOBase) -> None:
        self._file, self.checksum = file, Checksum()

    def write(self, content: Buffer) -> int:
        self.checksum.update(content)
        count: int = self._file.write(content)
        return count

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Leaves the file open for the next piece."""
        self._file.flush()


class _CheckedStreams(_StorageWriterTransforms):
    """Where DCP lets extensions transform what it writes; here nothing is transformed."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[MetadataIndex, _CheckedStream] = {}

    def transform_save_stream(
        self, write_item: WriteItem, raw_stream: io.IOBase
    ) -> tuple[Any, list[str]]:
        stream = self._streams[write_item.index] = _CheckedStream(raw_stream)
        return stream, []

    def checked(self, result: WriteResult) -> _CheckedResult:
        checksum = self._streams[result.index].checksum.text()
        return _CheckedResult(result.index, result.size_in_bytes, result.storage_data, checksum)


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
        self.transforms: _CheckedStreams = _CheckedStreams()
        self.pieces: dict[str, dict[str, str]] = {}
        """On rank 0, after `finish`: the checksums of what all ranks wrote (`contents.py`)."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file."""
        try:
            results = super().write_data(plan, planner).value()
        except (OSError, RuntimeError) as error:  # torch.save turns OSError into RuntimeError
            file = f"{plan.storage_data.prefix}0.distcp"
            content: str = getattr(planner, "writing")  # noqa: B009 - not in SavePlanner
            raise _write_error(self._location / file, content, error) from error
        done: Future[list[WriteResult]] = Future()
        done.set_result([self.transforms.checked(result) for result in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes `.metadata`; on one rank."""
        for result in chain.from_iterable(results):
            assert isinstance(result, _CheckedResult)
            info = result.storage_data
            self.pieces.setdefault(info.relative_path, {})[str(info.offset)] = result.checksum
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
        message = f"the disk or quota is full: no space for {content}"
        return CheckpointError.of_os_error(str(path), message, system)
    message = f"{content} cannot be written: {system.strerror}"
    return CheckpointError.of_os_error(str(path), message, system)


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
        message = f"cannot be written: {error.strerror}"
        return CheckpointError.of_os_error(str(location), message, error)
    return error
