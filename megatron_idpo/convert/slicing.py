"""How a Hugging Face tensor is cut over tensor-parallel ranks and fused into a Megatron parameter.

One class per layout rule, each with two directions that undo each other: `fill` takes from the
Hugging Face files only the bytes that this rank owns, `merge` puts the shards of all ranks together
again. Values are moved, never computed with, so a round trip is exact to the bit.

    V  vocabulary   R  rows of a tensor   r  this rank's share of rows or columns
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_idpo.checkpoint.dtype_checks import check_range
from megatron_idpo.mcore.model.architecture import Architecture

_BLOCK_BYTES = 32 << 20
"""Read at once: enough for any disk, and little beside a model."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a tensor-parallel parameter: part `rank` of `size` equal parts."""

    rank: int
    size: int

    def of(self, size: int) -> slice:
        """This part of `size` rows or columns; `Layout.check` has made sure that they divide."""
        assert size % self.size == 0, f"{size} over {self.size} ranks"
        part = size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


class TensorSource(Protocol):
    """Where Hugging Face tensors are read from (`hf_reader.HfCheckpoint`)."""

    @property
    def directory(self) -> Path:
        """What to name in errors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or some of its rows or columns."""


class Slicing(Protocol):
    """One rule: how named Hugging Face tensors become one parameter, and back."""

    def fill(
        self,
        parameter: Tensor,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> None:
        """Read this rank's shard into its parameter, casting to the parameter's format."""

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The whole Hugging Face tensors, in the order of `hf_names`, from all ranks' shards."""


class Replicated:
    """The same tensor on every rank: norms."""

    def fill(
        self,
        parameter: Tensor,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> None:
        """The whole tensor."""
        (name,) = hf_names
        _fill(parameter, source, name, slice(0, source.shape(name)[0]))

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The first rank's copy; the others are equal to it."""
        return [shards[0]]


class ColumnsSplit:
    """Cut by columns: the row-parallel linears, whose input is spread over the ranks."""

    def fill(
        self,
        parameter: Tensor,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> None:
        """This rank's columns."""
        (name,) = hf_names
        num_rows, num_columns = source.shape(name)
        _fill(parameter, source, name, slice(0, num_rows), shard.of(num_columns))

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """All columns."""
        return [_joined(shards, dim=1)]


class VocabSplit:
    """Cut by rows of the vocabulary, padded with zero rows until it divides by the ranks."""

    def fill(
        self,
        parameter: Tensor,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> None:
        """This rank's rows, with the padding that falls to it."""
        (name,) = hf_names
        vocab_size = source.shape(name)[0]
        per_rank = -(-vocab_size // shard.size)
        assert len(parameter) == per_rank, f"{len(parameter)} rows of {vocab_size} for {shard}"
        start = min(shard.rank * per_rank, vocab_size)
        stop = min(start + per_rank, vocab_size)
        _fill(parameter[: stop - start], source, name, slice(start, stop))
        parameter[stop - start :].zero_()

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """All rows of the vocabulary, without the padding."""
        return [_joined(shards)[: architecture.vocab_size]]


class FusedGateUp:
    """SwiGLU's two inputs in one parameter: each rank holds its gate rows, then its up rows."""

    def fill(
        self,
        parameter: Tensor,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> None:
        """This rank's rows of the gate above this rank's rows of the up projection."""
        for name, part in zip(hf_names, parameter.chunk(2), strict=True):
            _fill(part, source, name, shard.of(source.shape(name)[0]))

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The gate, then the up projection."""
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[part] for half in halves]) for part in range(2)]


class FusedQKV:
    """Queries, keys and values by query group: the group's queries, its key, its value, the next.

    megatron-core 0.19 `SelfAttention.get_query_key_value_tensors` splits `linear_qkv` this way. A
    rank holds whole groups, so each of q, k and v is read as one run of rows. Weights and biases.
    """

    def fill(
        self,
        parameter: Tensor,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> None:
        """This rank's groups."""
        parts = self._by_group(parameter, architecture, architecture.num_kv_heads // shard.size)
        for name, part in zip(hf_names, parts, strict=True):
            _fill(part, source, name, shard.of(source.shape(name)[0]))

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """q, k and v of all groups."""
        parts = self._by_group(_joined(shards), architecture, architecture.num_kv_heads)
        return [part.flatten(0, 1) for part in parts]

    def _by_group(
        self, fused: Tensor, architecture: Architecture, num_groups: int
    ) -> tuple[Tensor, ...]:
        """Views of q, k and v in a fused tensor, with a dimension of groups before the rows."""
        head_dim = architecture.head_dim
        queries = architecture.num_heads // architecture.num_kv_heads * head_dim
        by_group = fused.unflatten(0, (num_groups, -1))
        q, k, v = by_group.split([queries, head_dim, head_dim], dim=1)
        return q, k, v


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """All parts in one tensor; a single one as it is, without a copy."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def _fill(
    into: Tensor, source: TensorSource, name: str, rows: slice, columns: slice | None = None
) -> None:
    """Read rows of a tensor, or some columns of them, into a view of a parameter, in blocks.

    So a vocabulary of any size is loaded without a copy of it in between.

    Args:
        into: as many elements as the rows have; its first dimension cuts them into equal runs.
        source: where to read from.
        name: the Hugging Face tensor.
        rows: with start and stop.
        columns: None takes all.
    """
    if not len(into):
        return
    run_rows = (rows.stop - rows.start) // len(into)
    assert run_rows * len(into) == rows.stop - rows.start, f"{rows} of {name} in {len(into)} runs"
    block_runs = max(_BLOCK_BYTES // into[0].nbytes, 1)
    start = rows.start
    for block in into.split(block_runs):
        stop = start + run_rows * len(block)
        read = source.read(name, rows=slice(start, stop), columns=columns)
        block.copy_(read.view(block.shape))
        check_range(str(source.directory), name, block, read.dtype)
        start = stop
