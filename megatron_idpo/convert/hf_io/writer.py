"""Hugging Face weights written tensor by tensor, by several processes, and whole or not at all.

All tensors are known by name, shape and format before the first one is there, so every byte has its
place: each process writes its own tensors into it in any order and holds one tensor at a time. The
files lie in a hidden sibling of the target (`atomic`) and get their headers last: until `finish`
has counted every tensor and renamed the directory, nothing there can be taken for a checkpoint.

    writer = HfWriter(target, specs, token=...)     every process, the same arguments
    writer.begin()                                  one process; then a barrier
    writer.write(name, tensor)                      whoever has it
    names = writer.flush()                          every process; then gather the names
    writer.finish(names_of_the_others)              the process that began; then a barrier

Used as a context manager it discards everything when an exception passes. What goes beside the
weights (`config.json`, tokenizer) is put into `writer.incomplete` before `finish`.
"""

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_idpo.convert.hf_io.reader import INDEX_FILE, SINGLE_FILE
from megatron_idpo.convert.hf_io.safetensors_header import FilePlan, TensorSpec, plan_file
from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage import directories as atomic

MAX_SHARD_BYTES = 5_000_000_000
"""The hub's own default."""

_METADATA = {"format": "pt"}  # Transformers refuses files that do not say it
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
        overwrite: bool = False,
    ) -> None:
        """Plans the files; touches no disk.

        Args:
            directory: where the export is to appear.
            tensors: all of them, in the order in which they fill the shards.
            token: what tells this attempt from others; the same in all processes.
            max_shard_bytes: tensor data per file; a larger tensor gets a file of its own.
            metadata: for the files' headers, beside `{"format": "pt"}`.
            single_file: the file's name where one is enough.
            overwrite: replace an existing export.

        Raises:
            CheckpointError: a format that safetensors cannot store.
        """
        assert len({spec.name for spec in tensors}) == len(tensors), "a tensor is named twice"
        self.target = Path(directory).resolve()
        self.incomplete = atomic.incomplete_directory(self.target, token)
        self._token = token
        self._overwrite = overwrite
        self._single_file = single_file
        headers = {**_METADATA, **(metadata or {})}
        self._files = _plan_files(tensors, max_shard_bytes, headers, single_file)
        self._places = {
            location.spec.name: (file, location)
            for file, plan in self._files.items()
            for location in plan.placements
        }
        self._written: set[str] = set()
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files, and removes everything if an exception passes."""
        if kind is None:
            self._close()
        else:
            self.discard()

    @property
    def num_bytes(self) -> int:
        """What the weights take on disk."""
        return sum(plan.num_bytes for plan in self._files.values())

    def begin(self) -> None:
        """Makes the directory and reserves the disk space of every file. By one process.

        Raises:
            CheckpointError: the target cannot be used or replaced, or the disk is too full;
                nothing is left behind.
        """
        atomic.check_target(self.target, overwrite=self._overwrite)
        if self.target.is_dir() and any(self.target.iterdir()):
            self._check_replaceable()
        atomic.begin(
            self.target, self._token, overwrite=self._overwrite, needed_bytes=self.num_bytes
        )
        for file, plan in self._files.items():
            try:
                descriptor = _open(self.incomplete / file)
                try:
                    _reserve(descriptor, plan.num_bytes)
                finally:
                    os.close(descriptor)
            except OSError as error:
                self.discard()
                what = _describe([location.spec for location in plan.placements])
                raise self._failed(file, what, plan.num_bytes, error) from None

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor into its place; a device tensor is copied to the CPU, alone.

        Args:
            name: one of the names announced, written by no one else.
            tensor: of the announced shape and format, on any device.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        assert name in self._places, f"{name} was not announced"
        assert name not in self._written, f"{name} is written twice"
        file, location = self._places[name]
        spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        assert spec == location.spec, f"{spec}, but announced was {location.spec}"
        flat = tensor.detach().cpu().flatten().view(torch.uint8)
        try:
            if file not in self._descriptors:
                self._descriptors[file] = _open(self.incomplete / file)
            _write_all(self._descriptors[file], memoryview(flat.numpy()), location.start)
        except OSError as error:
            raise self._failed(file, f"tensor {name!r}", spec.num_bytes, error) from None
        self._written.add(name)

    def flush(self) -> list[str]:
        """What this process has written is on the disk; to be called before anyone finishes.

        Returns:
            The names that this process has written.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        for file, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                specs = [location.spec for location in self._files[file].placements]
                mine = [spec for spec in specs if spec.name in self._written]
                num_bytes = sum(spec.num_bytes for spec in mine)
                raise self._failed(file, _describe(mine), num_bytes, error) from None
        self._close()
        return sorted(self._written)

    def finish(self, written_elsewhere: Sequence[str] = ()) -> None:
        """Writes headers and index, and lets the directory appear. By the process that began.

        Args:
            written_elsewhere: what `flush` returned in all other processes, one after another.

        Raises:
            CheckpointError: a tensor was not written, or by two processes; or the disk fails.
        """
        counts = Counter([*self.flush(), *written_elsewhere])
        missing = [name for name in self._places if not counts[name]]
        twice = [name for name in counts if counts[name] > 1]
        assert counts.keys() <= self._places.keys(), "someone wrote a tensor nobody announced"
        for names, what in ((missing, "was not written"), (twice, "was written twice")):
            if names:
                path = str(self.target / self._places[names[0]][0])
                others = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
                raise CheckpointError.at(path, f"tensor {names[0]!r}{others} {what}")
        if len(self._files) > 1:
            self._write_file(INDEX_FILE, self._index(), 0)
        for file, plan in self._files.items():
            self._write_file(file, plan.header, 0)
        atomic.publish(self.incomplete, self.target, overwrite=self._overwrite)

    def discard(self) -> None:
        """Closes and removes what has been written; the target stays as it is."""
        self._close()
        atomic.discard(self.incomplete)

    def _check_replaceable(self) -> None:
        """What is going to be deleted is an earlier export, not somebody's home directory."""
        if not any((self.target / name).is_file() for name in (self._single_file, INDEX_FILE)):
            raise CheckpointError.at(
                str(self.target),
                "is not overwritten, because it holds something else than Hugging Face weights",
                "remove it yourself, or name another directory",
            )

    def _index(self) -> bytes:
        specs = [location.spec for _, location in self._places.values()]
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(spec.shape) for spec in specs),
                "total_size": sum(spec.num_bytes for spec in specs),
            },
            "weight_map": {name: file for name, (file, _) in self._places.items()},
        }
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

    def _write_file(self, file: str, content: bytes, position: int) -> None:
        try:
            descriptor = _open(self.incomplete / file)
            try:
                _write_all(descriptor, memoryview(content), position)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._failed(file, "its header", len(content), error) from None

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _failed(self, file: str, what: str, num_bytes: int, error: OSError) -> CheckpointError:
        """A failure of the disk, for the user."""
        path = str(self.target / file)
        if error.errno in _FULL:
            return CheckpointError.at(
                path,
                f"the disk or quota is full: no room for {what}, {num_bytes:,} bytes",
                f"the whole export needs {self.num_bytes:,} bytes",
            )
        return CheckpointError.at(path, f"{what} cannot be written: {error.strerror}")


def _plan_files(
    specs: Sequence[TensorSpec],
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    single_file: str,
) -> dict[str, FilePlan]:
    """Fills shards in the given order; always at least one file."""
    shards: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for spec in specs:
        if shards[-1] and spec.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= spec.num_bytes
    if len(shards) == 1:
        return {single_file: plan_file(shards[0], metadata)}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": plan_file(shard, metadata)
        for number, shard in enumerate(shards, start=1)
    }


def _describe(specs: Sequence[TensorSpec]) -> str:
    """Tensors of one file, in words."""
    if len(specs) == 1:
        return f"tensor {specs[0].name!r}"
    return f"tensors {specs[0].name!r} to {specs[-1].name!r}" if specs else "a file without tensors"


def _open(path: Path) -> int:
    """A descriptor to write to a file that may exist; the directory must."""
    return os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Takes the disk space now, so that a full disk is noticed before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:  # macOS: the free space has been compared, and a write can still fail
        os.ftruncate(descriptor, num_bytes)


def _write_all(descriptor: int, rest: memoryview, position: int) -> None:
    """Writes everything; the system may take less than asked for at a time."""
    while rest:
        count = os.pwrite(descriptor, rest, position)
        rest, position = rest[count:], position + count
