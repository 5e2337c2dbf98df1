"""Tensor chunks into `torch_dist` files and out of them, with torch.distributed.checkpoint (DCP).

The planners here translate `TensorChunk`s into DCP's write and read items. DCP decides what is
stored where in the files and exchanges that between the ranks. Files and errors are those of
`checkpoint/dcp_io.py`.

Shapes: N stored chunks of a tensor, D dimensions of the tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_idpo.checkpoint.contents import Contents
from megatron_idpo.checkpoint.dcp_io import Reader, Writer, first_failure, write_failure
from megatron_idpo.checkpoint.dtypes import check_range
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
from megatron_idpo.mcore.parallel.replicas import Replicas
from megatron_idpo.mcore.parallel.world import raise_on_all_ranks

Ints = NDArray[np.int64]


def write_chunks(
    chunks: Sequence[TensorChunk], directory: Path, group: dist.ProcessGroup, *, location: Path
) -> dict[str, dict[str, str]]:
    """Writes every rank's chunks into a directory. Collective over `group`, from any thread.

    Args:
        chunks: those that this rank writes, in CPU memory. No element of a tensor may be in two
            chunks, of this or of different ranks.
        directory: exists and is empty, the same on every rank.
        group: of all ranks, over the CPU; not used by any other thread meanwhile.
        location: the directory's name in errors.

    Returns:
        On the group's first rank, the checksums of what all ranks wrote, for `contents.py`.

    Raises:
        CheckpointError: on every rank, if any of them could not write.
    """
    writer = Writer(directory, location, from_host=True)
    try:
        torch_checkpoint.save(
            {}, storage_writer=writer, planner=_SavePlanner(chunks), process_group=group
        )
    except CheckpointException as failed:  # derives from BaseException, not from Exception
        raise write_failure(failed, location) from failed
    return writer.pieces


def read_chunks(
    chunks: Sequence[TensorChunk], directory: Path, contents: Contents | None = None
) -> None:
    """Fills chunks in place from a checkpoint of any layout. Not collective.

    Args:
        chunks: of any layout; `saved_here` is ignored.
        directory: a checkpoint that `checkpoint/stored_weights.py` has checked.
        contents: its checksums; without them, the CRC in the files are compared.

    Raises:
        CheckpointError: a file is damaged, or a value too large for the dtype of its chunk.
    """
    planner = _LoadPlanner([(chunk, None) for chunk in chunks], directory)
    _load(planner, Reader(directory, contents))


def read_chunks_together(
    chunks: Sequence[tuple[TensorChunk, Replicas | None]],
    directory: Path,
    contents: Contents | None,
    metadata: Metadata,
) -> None:
    """Fills chunks of all ranks; replicas read a stored piece that they have in common once.

    Collective.

    Args:
        chunks: each with the ranks that read the same one, which list them in the same order; None:
            this rank reads it alone.
        directory: as for `read_chunks`.
        contents: likewise.
        metadata: the checkpoint's list of tensors.

    Raises:
        CheckpointError: on every rank; as `read_chunks`.
    """
    planner = _LoadPlanner(chunks, directory)
    with raise_on_all_ranks("reading the checkpoint"):
        _load(planner, Reader(directory, contents, metadata))
    planner.exchange()


def _load(planner: "_LoadPlanner", reader: Reader) -> None:
    try:
        torch_checkpoint.load({}, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as failed:
        raise first_failure(failed) from failed


class _SavePlanner(SavePlanner):
    """Plans one write item per chunk."""

    writing = "the first tensor"
    """The tensor that is being written, for errors."""

    def __init__(self, chunks: Sequence[TensorChunk]) -> None:
        self._chunks = {(chunk.key, chunk.offset): chunk for chunk in chunks}
        assert len(self._chunks) == len(chunks), "a chunk would be written twice"

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(chunk) for chunk in self._chunks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        # DCP does not notice overlapping chunks. Fewer elements are fine: frozen layers, padding.
        for key, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            elements = sum(prod(chunk.sizes) for chunk in stored.chunks)
            assert elements <= prod(stored.size), f"{key}: {elements} of {tuple(stored.size)}"
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        self.writing = f"tensor {write_item.index.fqn!r}"
        return self._chunks[write_item.index.fqn, tuple(write_item.index.offset)].tensor


def _write_item(chunk: TensorChunk) -> WriteItem:
    offset = torch.Size(chunk.offset)
    return WriteItem(
        MetadataIndex(chunk.key, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offset, chunk.tensor.shape),
            TensorProperties(chunk.tensor.dtype),
            torch.Size(chunk.global_shape),
        ),
    )


@dataclass(frozen=True)
class _StoredChunks:
    """The chunks that a checkpoint holds of one tensor."""

    starts_ND: Ints
    stops_ND: Ints

    @classmethod
    def of(cls, stored: TensorStorageMetadata) -> "_StoredChunks":
        starts_ND = np.array([tuple(chunk.offsets) for chunk in stored.chunks], dtype=np.int64)
        sizes_ND = np.array([tuple(chunk.sizes) for chunk in stored.chunks], dtype=np.int64)
        return cls(starts_ND, starts_ND + sizes_ND)

    def overlaps(self, chunk: TensorChunk) -> Iterator[tuple[Ints, Ints, Ints]]:
        """For each overlapping stored chunk: its start; start and stop of the overlap.

        All three are positions in the whole tensor, [D].
        """
        # Vectorized: a distributed optimizer's checkpoint has thousands of chunks per tensor.
        starts_ND = np.maximum(self.starts_ND, np.array(chunk.offset))
        stops_ND = np.minimum(self.stops_ND, np.array(chunk.offset) + np.array(chunk.tensor.shape))
        for index in np.flatnonzero((starts_ND < stops_ND).all(axis=1)):
            yield self.starts_ND[index], starts_ND[index], stops_ND[index]


class _LoadPlanner(LoadPlanner):
    """Plans one read item per overlap of a wanted chunk with a stored chunk."""

    def __init__(
        self, chunks: Sequence[tuple[TensorChunk, Replicas | None]], directory: Path
    ) -> None:
        self._chunks = [chunk for chunk, _ in chunks]
        self._replicas = [replicas for _, replicas in chunks]
        self._directory = directory
        self._shared: dict[Replicas, list[tuple[int, ReadItem]]] = {}
        """The items of each group of replicas, with the rank of the group that reads it."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        stored: dict[str, _StoredChunks] = {}
        own: list[ReadItem] = []
        shared: dict[Replicas, list[ReadItem]] = {}
        for index, (chunk, replicas) in enumerate(zip(self._chunks, self._replicas, strict=True)):
            if chunk.key not in stored:
                entry = self._metadata.state_dict_metadata[chunk.key]
                assert isinstance(entry, TensorStorageMetadata)
                stored[chunk.key] = _StoredChunks.of(entry)
            chunk_items = list(_read_items(index, chunk, stored[chunk.key]))
            if sum(prod(item.lengths) for item in chunk_items) < chunk.tensor.numel():
                assert chunk.padded, f"not all of {chunk.key} is in the checkpoint"
                chunk.tensor.zero_()
            (own if replicas is None else shared.setdefault(replicas, [])).extend(chunk_items)
        for replicas, items in shared.items():
            self._shared[replicas] = self._with_readers(replicas, items)
            own += [item for reader, item in self._shared[replicas] if reader == replicas.rank]
        return LoadPlan(own)

    def exchange(self) -> None:
        """Fills the chunks that replicas share, after each has read its part. Collective."""
        for replicas, items in self._shared.items():
            replicas.exchange((reader, self.resolve_tensor(item)) for reader, item in items)

    def _with_readers(
        self, replicas: Replicas, items: Sequence[ReadItem]
    ) -> list[tuple[int, ReadItem]]:
        """Which of the replicas reads each item: a stored piece is read as a whole, by one."""
        pieces = list(dict.fromkeys(item.storage_index for item in items))
        sizes_bytes = [self._metadata.storage_data[piece].length for piece in pieces]
        readers = dict(zip(pieces, replicas.readers(sizes_bytes), strict=True))
        return [(readers[item.storage_index], item) for item in items]

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.index is not None
        tensor = self._chunks[read_item.dest_index.index].tensor
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dimension, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        name = read_item.storage_index.fqn
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        check_range(str(self._directory), name, tensor, stored.properties.dtype)


def _read_items(index: int, chunk: TensorChunk, stored: _StoredChunks) -> Iterator[ReadItem]:
    for stored_start, start, stop in stored.overlaps(chunk):
        yield ReadItem(
            LoadItemType.TENSOR,
            dest_index=MetadataIndex(chunk.key, chunk.offset, index),
            dest_offsets=torch.Size((start - np.array(chunk.offset)).tolist()),
            storage_index=MetadataIndex(chunk.key, stored_start.tolist()),
            storage_offsets=torch.Size((start - stored_start).tolist()),
            lengths=torch.Size((stop - start).tolist()),
        )
