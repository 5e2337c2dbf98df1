"""How Hugging Face tensors are split over tensor-parallel ranks and fused into parameters.

One class per layout rule, with two directions that invert each other: `Slicing.blocks` lists what
of the Hugging Face files belongs into this rank's parameter, `merge` joins the shards of all ranks.
Values are moved, never computed with, so a round trip is bitwise exact.

    V  vocabulary   R  rows of a tensor   r  this rank's share of rows or columns
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_idpo.checkpoint.dtypes import check_range
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.mcore.model.architecture import Architecture

_BLOCK_BYTES = 32 << 20
"""Size of one read: enough for disk throughput, small compared to a model."""

Shapes = Sequence[tuple[int, ...]]

Part = tuple[Tensor, slice, slice | None]
"""A view of a parameter, and the rows and columns (None: all) of a tensor that belong into it."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a tensor-parallel parameter: part `rank` of `size` equal parts.

    The tensor parallelism of an expert's parameters may be another one than that of the rest.
    """

    rank: int
    size: int

    def of(self, size: int) -> slice:
        """This part of `size` rows or columns; `Layout.check` ensures that they divide."""
        assert size % self.size == 0, f"{size} over {self.size} ranks"
        part = size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One read: some rows of a Hugging Face tensor, or some of their columns."""

    target: Tensor
    """The view of a parameter that they belong into; not always contiguous."""

    name: str
    """Of the Hugging Face tensor."""

    rows: slice
    columns: slice | None
    """None: all."""

    @property
    def num_bytes(self) -> int:
        """In the parameter's dtype."""
        return self.target.nbytes

    def read(self, source: HfCheckpoint) -> None:
        """Reads the values into the parameter, casting to its dtype.

        Raises:
            CheckpointError: the file is damaged, or a value too large for the dtype.
        """
        values = source.read(self.name, rows=self.rows, columns=self.columns)
        self.target.copy_(values.view(self.target.shape))
        check_range(str(source.directory), self.name, self.target, values.dtype)


class Slicing(ABC):
    """One rule: how Hugging Face tensors become one parameter, and back."""

    def blocks(
        self,
        parameter: Tensor,
        source: HfCheckpoint,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Iterator[Block]:
        """The blocks that fill this rank's parameter, and zeroes what no block fills.

        In blocks, so that loading a large vocabulary needs no second copy of it, and data-parallel
        ranks can share the work.
        """
        shapes = [source.shape(name) for name in hf_names]
        parts = self.parts(parameter, shapes, architecture, shard)
        if len(hf_names) == 1:  # one tensor may have several parts
            hf_names = list(hf_names) * len(parts)
        for name, (view, rows, columns) in zip(hf_names, parts, strict=True):
            yield from _blocks(view, name, rows, columns)

    @abstractmethod
    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """For each Hugging Face tensor: the view of the parameter that some of it belongs into.

        A single tensor may have several parts.
        """

    @abstractmethod
    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The whole Hugging Face tensors, in the order of `hf_names`, from the shards of all ranks.

        Inverse of `blocks`.
        """


class Replicated(Slicing):
    """The same tensor on every rank: norms."""

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """The whole tensor."""
        ((num_rows, *_),) = shapes
        return [(parameter, slice(0, num_rows), None)]

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The first rank's copy; the others are equal."""
        return [shards[0]]


class ColumnsSplit(Slicing):
    """Split by columns: row-parallel linears, whose input is distributed over the ranks."""

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """This rank's columns."""
        ((num_rows, num_columns),) = shapes
        return [(parameter, slice(0, num_rows), shard.of(num_columns))]

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """All columns."""
        return [_joined(shards, dim=1)]


class VocabSplit(Slicing):
    """Split by rows of the vocabulary, padded with zero rows to a multiple of the ranks."""

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """This rank's rows. Zeroes its padding, which no part covers."""
        ((vocab_size, *_),) = shapes
        per_rank = -(-vocab_size // shard.size)
        assert len(parameter) == per_rank, f"{len(parameter)} rows of {vocab_size} for {shard}"
        # A small vocabulary can end before this rank's rows begin: then all of them are padding.
        start = min(shard.rank * per_rank, vocab_size)
        stop = min(start + per_rank, vocab_size)
        parameter[stop - start :].zero_()
        return [(parameter[: stop - start], slice(start, stop), None)]

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """All rows of the vocabulary, without the padding."""
        return [_joined(shards)[: architecture.vocab_size]]


class FusedGateUp(Slicing):
    """SwiGLU's two inputs in one parameter: each rank holds its gate rows, then its up rows."""

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """This rank's gate rows, then its up rows."""
        halves = zip(parameter.chunk(2), shapes, strict=True)
        return [(half, shard.of(shape[0]), None) for half, shape in halves]

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The gate, then the up projection."""
        # Joining whole shards would interleave the halves: gate 0, up 0, gate 1, up 1.
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [_joined(gates), _joined(ups)]


class FusedQKV(Slicing):
    """Queries, keys and values by query group: a group's queries, its key, its value, the next.

    megatron-core 0.19 `SelfAttention.get_query_key_value_tensors` splits `linear_qkv` this way. A
    rank holds whole groups, so its part of each of q, k and v is one contiguous run of rows. For
    weights and biases.
    """

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """This rank's groups of q, of k and of v."""
        views = self._by_group(parameter, architecture, architecture.num_kv_heads // shard.size)
        pairs = zip(views, shapes, strict=True)
        return [(view, shard.of(shape[0]), None) for view, shape in pairs]

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """q, k and v of all groups."""
        views = self._by_group(_joined(shards), architecture, architecture.num_kv_heads)
        return [view.flatten(0, 1) for view in views]

    def _by_group(
        self, fused: Tensor, architecture: Architecture, num_groups: int
    ) -> tuple[Tensor, ...]:
        """Views of q, k and v in a fused tensor: [groups, rows per group, ...]."""
        head_dim = architecture.head_dim
        queries = architecture.num_heads // architecture.num_kv_heads * head_dim
        by_group = fused.unflatten(0, (num_groups, -1))
        q, k, v = by_group.split([queries, head_dim, head_dim], dim=1)
        return q, k, v


class WholeGateUp(FusedGateUp):
    """The same, where Hugging Face's tensor has all gate rows, then all up rows."""

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """This rank's gate rows, then its up rows, of one tensor."""
        ((num_rows, *columns),) = shapes
        halves = [(num_rows // 2, *columns)] * 2
        return _stacked(super().parts(parameter, halves, architecture, shard), [num_rows // 2] * 2)

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The gate above the up projection."""
        return [_joined(super().merge(shards, architecture))]


class WholeQKV(FusedQKV):
    """The same, where Hugging Face's tensor has all queries, then all keys, then all values."""

    def parts(
        self, parameter: Tensor, shapes: Shapes, architecture: Architecture, shard: Shard
    ) -> list[Part]:
        """This rank's groups of q, of k and of v, of one tensor."""
        ((_, *columns),) = shapes
        heads = (architecture.num_heads, architecture.num_kv_heads, architecture.num_kv_heads)
        by_kind = [(count * architecture.head_dim, *columns) for count in heads]
        parts = super().parts(parameter, by_kind, architecture, shard)
        return _stacked(parts, [rows for rows, *_ in by_kind])

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """q above k above v."""
        return [_joined(super().merge(shards, architecture))]


def _stacked(parts: Sequence[Part], heights: Sequence[int]) -> list[Part]:
    """Parts of tensors of these heights, as parts of one tensor with them below each other."""
    starts = [0, *accumulate(heights)]
    return [
        (view, slice(start + rows.start, start + rows.stop), columns)
        for (view, rows, columns), start in zip(parts, starts, strict=False)
    ]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """All parts in one tensor; a single part is returned without a copy."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def _blocks(target: Tensor, name: str, rows: slice, columns: slice | None) -> Iterator[Block]:
    """Rows of a tensor, or some of their columns, into a view of a parameter, in blocks.

    Args:
        target: as many elements as the rows have. Its first dimension splits the rows into runs of
            equal length (the query groups of `FusedQKV`).
        name: the Hugging Face tensor.
        rows: with start and stop.
        columns: None reads all.
    """
    if not len(target):
        return
    run_rows = (rows.stop - rows.start) // len(target)
    assert run_rows * len(target) == rows.stop - rows.start, f"{rows} of {name}: {len(target)} runs"
    block_runs = max(_BLOCK_BYTES // target[0].nbytes, 1)
    start = rows.start
    for view in target.split(block_runs):
        stop = start + run_rows * len(view)
        yield Block(view, name, slice(start, stop), columns)
        start = stop
