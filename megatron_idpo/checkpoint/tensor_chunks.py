"""A training state as boxes: rectangles of whole tensors, each of which lies in one piece here.

A distributed checkpoint stores tensors as rectangles. A weight's shard is one already. A
distributed optimizer holds an arbitrary stretch of a shard, in the order of memory: the end of a
row, whole rows, the beginning of a row, which are at most three rectangles of a matrix. Cut like
this, fp32 weights and moments go straight from where they lie into the files and back, without
being gathered, and in the terms of the whole tensor, so that any layout can read any other's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TensorChunk:
    """A rectangle of a whole tensor, and the memory of this rank that holds its values."""

    key: str
    """The whole tensor's name in checkpoints, the same in every layout."""

    whole: Shape
    """The whole tensor's shape; the layers of a model are stacked in the first dimension."""

    offset: Shape
    """Where the rectangle begins in it."""

    tensor: Tensor
    """The rectangle's values, with as many dimensions as the whole."""

    saved_here: bool = True
    """Whether this rank writes it; of copies one does."""

    padded: bool = False
    """Whether the whole tensor is padded by the layout (a vocabulary): another checkpoint's may be
    longer, then its end is left out, or shorter, then the rest is zeros."""


@dataclass(frozen=True, eq=False)
class Region:
    """A shard, or a part of one, of a parameter of this rank, as megatron-core describes it."""

    sharded: ShardedTensor

    start: int
    """Its first element, counting the parameter's elements in their order in memory."""

    @property
    def stop(self) -> int:
        """One behind its last element."""
        return self.start + int(prod(self.sharded.local_shape))


def regions_by_parameter(
    chunks: Sequence[Any],
) -> dict[torch.nn.Parameter, tuple[Region, ...]]:
    """How checkpoints know each parameter of this rank; several regions for SwiGLU's fused weight.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
    """
    found: dict[torch.nn.Parameter, tuple[Region, ...]] = {}
    for chunk in chunks:
        chunk = bare(chunk)
        own = {id(parameter): parameter for parameter in chunk.parameters()}
        for described in _leaves(chunk.sharded_state_dict()):
            parameter = own.get(id(described.data))
            if parameter is not None:
                found[parameter] = tuple(_regions(described, parameter))
    return found


def bare(chunk: Any) -> Any:
    """A model chunk without its wrappers (DDP, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def tensor_chunks_of(
    region: Region, flat: Tensor, start: int, *, prefix: str = "", is_cut: bool = False
) -> Iterator[TensorChunk]:
    """The rectangles of a region that `flat` holds.

    Args:
        region: of a parameter.
        flat: one-dimensional: values of the parameter's elements from `start` on.
        start: the number of the first, in the order of memory.
        prefix: of the key: what the values are, if not the weights.
        is_cut: whether the other data-parallel ranks have other elements, rather than the same.
    """
    sharded = region.sharded
    first, last = max(start, region.start), min(start + flat.numel(), region.stop)
    if first >= last:
        return
    ahead = sharded.prepend_axis_num
    saved_here = _is_saved_here(sharded.replica_id, is_cut)
    position = first - start
    for offset, size in rectangles(sharded.local_shape, first - region.start, last - region.start):
        length = prod(size)
        yield TensorChunk(
            key=f"{prefix}{sharded.key}",
            whole=tuple(sharded.global_shape),
            offset=(
                *sharded.global_offset[:ahead],
                *(a + b for a, b in zip(sharded.global_offset[ahead:], offset, strict=True)),
            ),
            tensor=flat[position : position + length].view(*(1,) * ahead, *size),
            saved_here=saved_here,
            padded=sharded.allow_shape_mismatch,
        )
        position += length


def rectangles(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Offset and size of the rectangles that elements `start` to `stop` of a tensor make up.

    In the order of memory; each lies there in one piece.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # within one row
        yield from _within(shape, last_whole, start, stop)
        return
    if start < first_whole * row:
        yield from _within(shape, first_whole - 1, start, first_whole * row)
    if first_whole < last_whole:
        size = (last_whole - first_whole, *shape[1:])
        yield (first_whole, *(0,) * (len(shape) - 1)), size
    if last_whole * row < stop:
        yield from _within(shape, last_whole, last_whole * row, stop)


def _within(shape: Shape, number: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """`rectangles` of elements that all lie in row `number`."""
    row = prod(shape[1:])
    for offset, size in rectangles(shape[1:], start - number * row, stop - number * row):
        yield (number, *offset), (1, *size)


def _is_saved_here(replica: int | tuple[int, ...], is_cut: bool) -> bool:
    """Of several copies of a shard, the one whose numbers are all 0 is saved.

    The last number counts the data-parallel ranks. Where those share one copy, each saves its part.
    """
    if not is_cut:
        return replica == 0 if isinstance(replica, int) else not any(replica)
    assert isinstance(replica, tuple), "a replica id that does not tell data-parallel ranks apart"
    return not any(replica[:-1])


def _regions(
    described: ShardedTensor | ShardedTensorFactory, parameter: Tensor
) -> Iterator[Region]:
    parts = [described]
    if isinstance(described, ShardedTensorFactory):
        parts = list(_leaves(described.build()))
    for part in parts:
        assert isinstance(part, ShardedTensor) and part.data is not None
        assert part.data.is_contiguous(), f"{part.key} is no contiguous part of its parameter"
        start = part.data.storage_offset() - parameter.storage_offset()
        assert 0 <= start <= parameter.numel() - part.data.numel(), f"{part.key} is a copy"
        yield Region(part, start)


def _leaves(nested: Any) -> Iterator[Any]:
    """Sharded tensors and factories among nested values; other things have no values to train."""
    if isinstance(nested, dict):
        nested = nested.values()
    elif isinstance(nested, ShardedTensor | ShardedTensorFactory):
        yield nested
        return
    elif not isinstance(nested, list | tuple):
        return
    for value in nested:
        yield from _leaves(value)
