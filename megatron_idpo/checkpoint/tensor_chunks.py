"""A training state as chunks: rectangles of whole tensors, each contiguous in this rank's memory.

A distributed checkpoint stores tensors as rectangles. The shard of a weight is one. A distributed
optimizer holds an arbitrary range of a shard's elements in memory order: the end of a row, whole
rows, the beginning of a row, which is at most three rectangles of a matrix. Split like this, fp32
weights and moments go directly from their memory into the files and back, without a gather, and in
coordinates of the whole tensor, so any layout can read the checkpoint of any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TensorChunk:
    """A rectangle of a whole tensor, and this rank's memory that holds its values."""

    key: str
    """The tensor's name in checkpoints, equal in every layout."""

    global_shape: Shape
    """Of the whole tensor; the layers of a model are stacked in the first dimension."""

    offset: Shape
    """Where the rectangle starts in the whole tensor."""

    tensor: Tensor
    """The values, with as many dimensions as the whole tensor."""

    saved_here: bool = True
    """Whether this rank writes it; of several copies, exactly one is written."""

    padded: bool = False
    """Whether the layout pads the whole tensor (a vocabulary). The tensor of another layout's
    checkpoint may then be longer, and its end is ignored, or shorter, and the rest is zeroed."""

    @classmethod
    def of(cls, sharded: ShardedTensor) -> Self:
        """A shard that is one rectangle, as megatron-core describes it."""
        return cls(
            sharded.key,
            tuple(sharded.global_shape),
            tuple(sharded.global_offset),
            sharded.data.detach()[(None,) * sharded.prepend_axis_num],
            padded=sharded.allow_shape_mismatch,
        )


@dataclass(frozen=True, eq=False)
class Region:
    """A parameter's shard, or a part of it, as megatron-core describes it."""

    sharded: ShardedTensor

    start: int
    """The first element, as an index into the flattened parameter."""

    @property
    def stop(self) -> int:
        """The element after the last one."""
        return self.start + int(prod(self.sharded.local_shape))


def regions_by_parameter(
    model_chunks: Sequence[Any],
) -> dict[torch.nn.Parameter, tuple[Region, ...]]:
    """The regions of each parameter of this rank; SwiGLU's fused weight has several.

    Args:
        model_chunks: of this rank, bare or wrapped.
    """
    regions: dict[torch.nn.Parameter, tuple[Region, ...]] = {}
    for model_chunk in map(unwrapped, model_chunks):
        parameters = {id(parameter): parameter for parameter in model_chunk.parameters()}
        for entry in sharded_entries(model_chunk.sharded_state_dict()):
            parameter = parameters.get(id(entry.data))
            if parameter is not None:
                regions[parameter] = tuple(_regions(entry, parameter))
    return regions


def unwrapped(model_chunk: Any) -> Any:
    """A model chunk without its wrappers (DDP, Float16Module)."""
    while hasattr(model_chunk, "module"):
        model_chunk = model_chunk.module
    return model_chunk


def tensor_chunks_of(
    region: Region, flat: Tensor, start: int, *, prefix: str = "", is_partitioned: bool = False
) -> Iterator[TensorChunk]:
    """The chunks of a region whose values are in `flat`.

    Args:
        region: of a parameter.
        flat: values for a range of the flattened parameter, one-dimensional.
        start: index of the first of them in the flattened parameter.
        prefix: of the key, for values other than the weights.
        is_partitioned: whether each data-parallel rank holds a different range (distributed
            optimizer) instead of a copy.
    """
    sharded = region.sharded
    first, last = max(start, region.start), min(start + flat.numel(), region.stop)
    if first >= last:
        return
    # The local shape lacks the leading dimensions, in which the layers of the model are stacked.
    num_leading = sharded.prepend_axis_num
    leading_offset = sharded.global_offset[:num_leading]
    shard_offset = sharded.global_offset[num_leading:]
    saved_here = _is_saved_here(sharded.replica_id, is_partitioned)
    position = first - start
    for offset, size in rectangles(sharded.local_shape, first - region.start, last - region.start):
        length = prod(size)
        yield TensorChunk(
            key=f"{prefix}{sharded.key}",
            global_shape=tuple(sharded.global_shape),
            offset=(*leading_offset, *(a + b for a, b in zip(shard_offset, offset, strict=True))),
            tensor=flat[position : position + length].view(*(1,) * num_leading, *size),
            saved_here=saved_here,
            padded=sharded.allow_shape_mismatch,
        )
        position += length


def rectangles(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and sizes of the rectangles that elements `start` to `stop` of a tensor consist of.

    In memory order; each rectangle is contiguous.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    # Whole rows are `first_whole` to `last_whole`, before and after them parts of a row.
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # all within one row
        yield from _within_row(shape, last_whole, start, stop)
        return
    if start < first_whole * row:
        yield from _within_row(shape, first_whole - 1, start, first_whole * row)
    if first_whole < last_whole:
        size = (last_whole - first_whole, *shape[1:])
        yield (first_whole, *(0,) * (len(shape) - 1)), size
    if last_whole * row < stop:
        yield from _within_row(shape, last_whole, last_whole * row, stop)


def _within_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """`rectangles` of elements that are all in row `index`."""
    row = prod(shape[1:])
    for offset, size in rectangles(shape[1:], start - index * row, stop - index * row):
        yield (index, *offset), (1, *size)


def _is_saved_here(replica_id: int | tuple[int, ...], is_partitioned: bool) -> bool:
    """Whether this copy of a shard is the one that is saved: all its replica numbers are 0.

    The last number counts the data-parallel ranks. If those hold different ranges of one copy, each
    of them saves its own.
    """
    if not is_partitioned:
        return replica_id == 0 if isinstance(replica_id, int) else not any(replica_id)
    assert isinstance(replica_id, tuple), "a replica id without the data-parallel rank"
    return not any(replica_id[:-1])


def _regions(entry: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> Iterator[Region]:
    # A factory stands for several sharded tensors: the gate and up halves of SwiGLU's weight.
    is_factory = isinstance(entry, ShardedTensorFactory)
    for part in sharded_entries(entry.build()) if is_factory else (entry,):
        assert isinstance(part, ShardedTensor) and part.data is not None
        assert part.data.is_contiguous(), f"{part.key} is not contiguous in its parameter"
        start = part.data.storage_offset() - parameter.storage_offset()
        assert 0 <= start <= parameter.numel() - part.data.numel(), f"{part.key} is a copy"
        yield Region(part, start)


def sharded_entries(nested: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """Sharded tensors and factories among nested values; others (objects) are not trained."""
    if isinstance(nested, dict):
        nested = nested.values()
    elif isinstance(nested, ShardedTensor | ShardedTensorFactory):
        yield nested
        return
    elif not isinstance(nested, list | tuple):
        return
    for value in nested:
        yield from sharded_entries(value)
