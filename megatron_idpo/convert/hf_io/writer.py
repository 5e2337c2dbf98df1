"""Hugging Face weights, written tensor by tensor by several processes, complete or not at all.

All tensors are known by name, shape and dtype before the first one is written, so the position of
every byte is known: each process writes its own tensors, in any order, and holds one at a time. The
files are in a hidden directory next to the target (`storage.atomic`). They get their headers last,
so nothing there can be taken for a checkpoint before `finish` has counted every tensor and renamed
the directory.

`write_together` runs all of this on the ranks of a job. The steps of it:

    writer = HfWriter(target, specs, token=...)     every process, the same arguments
    writer.begin()                                  one process; then a barrier
    writer.write(name, tensor)                      the process that has the tensor
    names = writer.flush()                          every process; then gather the names
    writer.finish(names_of_the_others)              the process that called `begin`; then a barrier

As a context manager, the writer deletes everything if an exception is raised. Files that belong to
the weights (`config.json`, tokenizer) are copied to `writer.incomplete` before `finish`.
"""

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_idpo.convert.hf_io.reader import INDEX_FILE, SINGLE_FILE
from megatron_idpo.convert.hf_io.safetensors_file import CHECKSUMS, FilePlan, TensorSpec, plan_file
from megatron_idpo.errors import CheckpointError, UserError
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    barrier,
    is_rank0,
    raise_on_all_ranks,
)
from megatron_idpo.storage import atomic

MAX_SHARD_BYTES = 5_000_000_000
"""The hub's default."""

_METADATA = {"format": "pt"}  # Transformers refuses files without it
_FULL = (errno.ENOSPC, errno.EDQUOT)


class HfWriter:
    """An export of known tensors into `model.safetensors`, or into shards with an index."""

    def __init__(
        self,
        directory: Path | str,
        tensors: Sequence[TensorSpec],
        *,
        token: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        single_file: str = SINGLE_FILE,
        checksums: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Plans the files; does not access the disk.

        Args:
            directory: the target of the export.
            tensors: all of them, in the order in which they fill the shards.
            token: identifies this attempt; the same in all processes.
            max_shard_bytes: tensor data per file; a larger tensor gets its own file.
            metadata: for the file headers, in addition to `{"format": "pt"}`.
            single_file: the file name if one file is enough.
            checksums: store the checksum of each tensor in the headers, for `HfCheckpoint.verify`.
            overwrite: replace an existing export.

        Raises:
            CheckpointError: safetensors cannot store one of the dtypes.
        """
        assert len({spec.name for spec in tensors}) == len(tensors), "duplicate tensor name"
        self.target = Path(directory).resolve()
        self.incomplete = atomic.incomplete_directory(self.target, token)
        self._token = token
        self._overwrite = overwrite
        self._single_file = single_file
        self._headers = {**_METADATA, **(metadata or {})}
        self._files = _plan_files(tensors, max_shard_bytes, self._headers, single_file)
        self.checksums: dict[str, str] | None = None
        """Of the tensors that this process has written, by name; None if they are not stored."""
        if checksums:
            self.checksums = {}
            self._files = {file: self._checked({}, plan) for file, plan in self._files.items()}
        self._positions = {
            spec.name: (file, spec, start)
            for file, plan in self._files.items()
            for spec, start in plan.tensors
        }
        self._written: set[str] = set()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Deletes what was written if an exception is raised; the target stays as it is."""
        if kind is not None:
            atomic.discard_directory(self.incomplete)

    @property
    def num_bytes(self) -> int:
        """The size of all weight files."""
        return sum(plan.num_bytes for plan in self._files.values())

    def begin(self) -> None:
        """Creates the directory and reserves the disk space of every file. By one process.

        Raises:
            CheckpointError: the target cannot be used or replaced, or the disk is too full.
        """
        atomic.check_target(self.target, overwrite=self._overwrite)
        markers = [self._single_file, INDEX_FILE]
        atomic.check_replaceable(self.target, markers, "a directory of Hugging Face weights")
        atomic.begin_directory(
            self.target, self._token, overwrite=self._overwrite, needed_bytes=self.num_bytes
        )
        for file, plan in self._files.items():
            with self._reported(file, "its tensors", plan.num_bytes) as descriptor:
                _reserve(descriptor, plan.num_bytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor at its position; a GPU tensor is copied to the CPU first.

        Args:
            name: one of the planned names, written by no other process.
            tensor: of the planned shape and dtype, on any device.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        assert name in self._positions, f"{name} was not planned"
        assert name not in self._written, f"{name} is written twice"
        file, planned, start = self._positions[name]
        spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        assert spec == planned, f"got {spec}, planned {planned}"
        flat = tensor.detach().cpu().flatten().view(torch.uint8)
        content = memoryview(flat.numpy())
        with self._reported(file, f"tensor {name!r}", spec.num_bytes) as descriptor:
            _write_all(descriptor, content, start)
        self._written.add(name)
        if self.checksums is not None:
            self.checksums[name] = spec.checksum(content)

    def flush(self) -> list[str]:
        """Waits until this process's tensors are on the disk; must precede any `finish`.

        Returns:
            The names of the tensors that this process has written.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        for file in sorted({self._positions[name][0] for name in self._written}):
            with self._reported(file, "its tensors", self._files[file].num_bytes) as descriptor:
                os.fsync(descriptor)
        return sorted(self._written)

    def finish(
        self,
        written_elsewhere: Sequence[str] = (),
        checksums_elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """Writes headers and index and publishes the directory. By the process that began.

        Args:
            written_elsewhere: results of `flush` of all other processes, concatenated.
            checksums_elsewhere: `checksums` of all other processes, merged.

        Raises:
            CheckpointError: a tensor was not written, or by two processes; or the disk fails.
        """
        counts = Counter([*self.flush(), *written_elsewhere])
        missing = [name for name in self._positions if not counts[name]]
        twice = [name for name in counts if counts[name] > 1]
        assert counts.keys() <= self._positions.keys(), "a process wrote an unplanned tensor"
        for names, problem in ((missing, "was not written"), (twice, "was written twice")):
            if names:
                path = str(self.target / self._positions[names[0]][0])
                others = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
                raise CheckpointError.at(path, f"tensor {names[0]!r}{others} {problem}")
        if len(self._files) > 1:
            self._write_header(INDEX_FILE, self._index())
        for file, plan in self._files.items():
            if self.checksums is not None:
                plan = self._checked({**self.checksums, **(checksums_elsewhere or {})}, plan)
            self._write_header(file, plan.header)
        atomic.publish_directory(self.incomplete, self.target, overwrite=self._overwrite)

    def _checked(self, checksums: Mapping[str, str], plan: FilePlan) -> FilePlan:
        """The same file with these checksums in its header; its size does not depend on them."""
        specs = [spec for spec, _ in plan.tensors]
        return plan_file(specs, {**self._headers, CHECKSUMS: plan.checksums(checksums)})

    def _index(self) -> bytes:
        specs = [spec for _, spec, _ in self._positions.values()]
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(spec.shape) for spec in specs),
                "total_size": sum(spec.num_bytes for spec in specs),
            },
            "weight_map": {name: file for name, (file, _, _) in self._positions.items()},
        }
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

    def _write_header(self, file: str, content: bytes) -> None:
        with self._reported(file, "its header", len(content)) as descriptor:
            _write_all(descriptor, memoryview(content), 0)

    @contextmanager
    def _reported(self, file: str, content: str, num_bytes: int) -> Iterator[int]:
        """A descriptor for writing some content of a file; reports errors of the disk."""
        try:
            # Closed after each tensor: on NFS, that is when a full disk is reported.
            descriptor = os.open(self.incomplete / file, os.O_CREAT | os.O_WRONLY, 0o666)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            location = str(self.target / file)
            if error.errno in _FULL:
                message = f"the disk or quota is full: no space for {content}, {num_bytes:,} bytes"
                remedy = f"the whole export needs {self.num_bytes:,} bytes"
                raise CheckpointError.at(location, message, remedy) from None
            message = f"{content} cannot be written: {error.strerror}"
            raise CheckpointError.of_os_error(location, message, error) from None


def write_together(
    writer: HfWriter, tensors: Iterable[tuple[str, Tensor]], add_companions: Callable[[Path], None]
) -> None:
    """Writes every rank's tensors and publishes the directory. Collective over the world.

    Args:
        writer: created with the same arguments on every rank.
        tensors: name and values of what this rank writes. Consumed to the end even after a failure,
            because producing them may involve collectives.
        add_companions: called on rank 0 with the incomplete directory, before it is published.

    Raises:
        CheckpointError: on every rank; nothing is left behind.
    """
    with _cleaned_up_on_all_ranks(), writer:
        with raise_on_all_ranks("preparing the export"):
            if is_rank0():
                writer.begin()
        with raise_on_all_ranks("writing the weights"):
            _write_tensors(writer, tensors)
            written = writer.flush()
        by_rank = all_gather_objects(written)
        checksums = all_gather_objects(writer.checksums or {})
        with raise_on_all_ranks("finishing the export"):
            if is_rank0():
                add_companions(writer.incomplete)
                writer.finish(
                    [name for names in by_rank[1:] for name in names],
                    {name: text for rank in checksums for name, text in rank.items()},
                )
    barrier()


@contextmanager
def _cleaned_up_on_all_ranks() -> Iterator[None]:
    """After a `UserError`, which all ranks raise, waits until all have deleted their files.

    Without it, torchrun would kill the other ranks as soon as the first one exits, in the middle of
    deleting.
    """
    try:
        yield
    except UserError:
        barrier()
        raise


def _write_tensors(writer: HfWriter, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes all tensors; after a failure the rest is dropped, so no rank hangs in a collective."""
    failure: CheckpointError | None = None
    for name, tensor in tensors:
        try:
            if failure is None:
                writer.write(name, tensor)
        except CheckpointError as error:
            failure = error
    if failure is not None:
        raise failure


def _plan_files(
    specs: Sequence[TensorSpec], max_shard_bytes: int, metadata: Mapping[str, str], single_file: str
) -> dict[str, FilePlan]:
    """Fills shards in the given order; at least one file."""
    shards: list[list[TensorSpec]] = [[]]
    free_bytes = max_shard_bytes
    for spec in specs:
        if shards[-1] and spec.num_bytes > free_bytes:
            shards.append([])
            free_bytes = max_shard_bytes
        shards[-1].append(spec)
        free_bytes -= spec.num_bytes
    if len(shards) == 1:
        return {single_file: plan_file(shards[0], metadata)}
    return {
        f"model-{index:05d}-of-{len(shards):05d}.safetensors": plan_file(shard, metadata)
        for index, shard in enumerate(shards, start=1)
    }


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Allocates the disk space, so that a full disk is detected before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:  # macOS: a write can still fail, although `begin_directory` has compared the free space
        os.ftruncate(descriptor, num_bytes)


def _write_all(descriptor: int, rest: memoryview, position: int) -> None:
    """Writes everything; one system call may write less than requested."""
    while rest:
        count = os.pwrite(descriptor, rest, position)
        rest, position = rest[count:], position + count
