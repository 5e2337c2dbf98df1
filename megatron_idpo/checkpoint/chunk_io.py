"""Boxes into `torch_dist` files and out of them, through torch's distributed checkpoints.

torch plans what lies where in the files and exchanges that between the ranks; what is written and
read is said here in its own terms, item by item. Files and errors are those of
`checkpoint/files.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
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

from megatron_idpo.checkpoint.dcp_io import Reader, Writer, failure_to_write, first_failure
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk


def write_chunks(
    boxes: Sequence[TensorChunk], directory: Path, group: dist.ProcessGroup, *, location: Path
) -> None:
    """Write every rank's boxes into a directory. Collective over `group`, from any thread.

    Args:
        boxes: those to be written here, in the host's memory. No element of a tensor lies in two
            boxes of all ranks.
        directory: exists and is empty, the same on every rank.
        group: of all ranks, over the CPU, used by nobody else meanwhile.
        location: what to call the directory in errors.

    Raises:
        CheckpointError: on every rank, when any of them could not write.
    """
    try:
        torch_checkpoint.save(
            {},
            storage_writer=Writer(directory, location, from_host=True),
            planner=_SavePlanner(boxes),
            process_group=group,
        )
    except CheckpointException as failed:  # no Exception, but BaseException
        raise failure_to_write(failed, location) from failed


def read_chunks(boxes: Sequence[TensorChunk], directory: Path) -> None:
    """Fill boxes from a checkpoint written in any layout, in their own memory. Not collective.

    Args:
        boxes: of any layout; `saved_here` does not matter.
        directory: a checkpoint that `checkpoint/contents.py` has looked at.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        torch_checkpoint.load(
            {},
            storage_reader=Reader(directory, verify=True),
            planner=_LoadPlanner(boxes),
            no_dist=True,
        )
    except CheckpointException as failed:
        raise first_failure(failed) from failed


class _SavePlanner(SavePlanner):
    """Plans one item per box."""

    writing = "the first tensor"
    """Which tensor is being written, for the error message."""

    def __init__(self, boxes: Sequence[TensorChunk]) -> None:
        self._boxes = {(box.key, box.offset): box for box in boxes}
        assert len(self._boxes) == len(boxes), "a rectangle would be written twice"

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(box) for box in self._boxes.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
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
        return self._boxes[write_item.index.fqn, tuple(write_item.index.offset)].tensor


def _write_item(box: TensorChunk) -> WriteItem:
    offset = torch.Size(box.offset)
    return WriteItem(
        MetadataIndex(box.key, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offset, box.tensor.shape),
            TensorProperties(box.tensor.dtype),
            torch.Size(box.whole),
        ),
    )


@dataclass(frozen=True)
class _Stored:
    """The rectangles that a checkpoint holds of one tensor; `[N, dimensions]` each."""

    offsets: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, stored: TensorStorageMetadata) -> "_Stored":
        offsets = np.array([tuple(chunk.offsets) for chunk in stored.chunks], dtype=np.int64)
        sizes = np.array([tuple(chunk.sizes) for chunk in stored.chunks], dtype=np.int64)
        return cls(offsets, offsets + sizes)

    def overlaps(self, box: TensorChunk) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """A stored rectangle's offset, and where it meets the box: begin and end in the whole."""
        begins = np.maximum(self.offsets, np.array(box.offset))
        ends = np.minimum(self.ends, np.array(box.offset) + np.array(box.tensor.shape))
        for number in np.flatnonzero((begins < ends).all(axis=1)):
            yield self.offsets[number], begins[number], ends[number]


class _LoadPlanner(LoadPlanner):
    """Plans one item per meeting of a box with a stored rectangle; there may be many of either."""

    def __init__(self, boxes: Sequence[TensorChunk]) -> None:
        self._boxes = boxes

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        stored: dict[str, _Stored] = {}
        items: list[ReadItem] = []
        for number, box in enumerate(self._boxes):
            if box.key not in stored:
                known = self._metadata.state_dict_metadata[box.key]
                assert isinstance(known, TensorStorageMetadata)
                stored[box.key] = _Stored.of(known)
            own = list(_read_items(number, box, stored[box.key]))
            if sum(prod(item.lengths) for item in own) < box.tensor.numel():
                assert box.padded, f"not all of {box.key} is in the checkpoint"
                box.tensor.zero_()
            items += own
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.index is not None
        tensor = self._boxes[read_item.dest_index.index].tensor
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dimension, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _read_items(number: int, box: TensorChunk, stored: _Stored) -> Iterator[ReadItem]:
    for offset, begin, end in stored.overlaps(box):
        yield ReadItem(
            LoadItemType.TENSOR,
            dest_index=MetadataIndex(box.key, box.offset, number),
            dest_offsets=torch.Size((begin - np.array(box.offset)).tolist()),
            storage_index=MetadataIndex(box.key, offset.tolist()),
            storage_offsets=torch.Size((begin - offset).tolist()),
            lengths=torch.Size((end - begin).tolist()),
        )
