"""How a Hugging Face tensor is cut over tensor-parallel ranks and fused into a Megatron parameter.

One class per layout rule, each with two directions that undo each other: `read` takes from the
Hugging Face files only the bytes that this rank owns, `merge` puts the shards of all ranks together
again. Values are moved, never computed with, so a round trip is exact to the bit.

    V  vocabulary   R  rows of a tensor   r  this rank's share of rows or columns
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_idpo.mcore.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a tensor-parallel parameter: part `rank` of `size` equal parts."""

    rank: int
    size: int

    def rows(self, num_rows: int) -> slice:
        """This part of `num_rows` rows; `Layout.check` has made sure that they divide."""
        assert num_rows % self.size == 0, f"{num_rows} rows over {self.size} ranks"
        part = num_rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


class TensorSource(Protocol):
    """Where Hugging Face tensors are read from (`hf_reader.HfCheckpoint`)."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The tensor, or some of its rows or columns."""


class Slicing(Protocol):
    """One rule: how named Hugging Face tensors become one parameter, and back."""

    def read(
        self,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Tensor:
        """This rank's shard of the parameter."""

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The whole Hugging Face tensors, in the order of `hf_names`, from all ranks' shards."""


class Replicated:
    """The same tensor on every rank: norms."""

    def read(
        self,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Tensor:
        """The whole tensor."""
        (name,) = hf_names
        return source.read(name)

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The first rank's copy; the others are equal to it."""
        return [shards[0]]


class ColumnsSplit:
    """Cut by columns: the row-parallel linears, whose input is spread over the ranks."""

    def read(
        self,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Tensor:
        """This rank's columns."""
        (name,) = hf_names
        return source.read(name, columns=shard.rows(source.shape(name)[1]))

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """All columns."""
        return [torch.cat(list(shards), dim=1)]


class VocabSplit:
    """Cut by rows of the vocabulary, padded with zero rows until it divides by the ranks."""

    def read(
        self,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Tensor:
        """This rank's rows, with the padding that falls to it."""
        (name,) = hf_names
        vocab_size = source.shape(name)[0]
        per_rank = -(-vocab_size // shard.size)
        start = min(shard.rank * per_rank, vocab_size)
        stop = min(start + per_rank, vocab_size)
        part_rH = source.read(name, rows=slice(start, stop))
        missing = per_rank - (stop - start)
        return torch.nn.functional.pad(part_rH, (0, 0, 0, missing)) if missing else part_rH

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """All rows of the vocabulary, without the padding."""
        whole_VH = torch.cat(list(shards)) if len(shards) > 1 else shards[0]
        return [whole_VH[: architecture.vocab_size]]


class FusedGateUp:
    """SwiGLU's two inputs in one parameter: each rank holds its gate rows, then its up rows."""

    def read(
        self,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Tensor:
        """This rank's rows of the gate above this rank's rows of the up projection."""
        return torch.cat(
            [source.read(name, rows=shard.rows(source.shape(name)[0])) for name in hf_names]
        )

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The gate, then the up projection."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in range(2)]


class FusedQKV:
    """Queries, keys and values by query group: the group's queries, its key, its value, the next.

    megatron-core 0.19 `SelfAttention.get_query_key_value_tensors` splits `linear_qkv` this way. A
    rank holds whole groups, so each of q, k and v is read as one run of rows. Weights and biases.
    """

    def read(
        self,
        source: TensorSource,
        hf_names: Sequence[str],
        architecture: Architecture,
        shard: Shard,
    ) -> Tensor:
        """This rank's groups."""
        parts = [source.read(name, rows=shard.rows(source.shape(name)[0])) for name in hf_names]
        num_groups = architecture.num_kv_heads // shard.size
        by_group = [part.unflatten(0, (num_groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """q, k and v of all groups."""
        head_dim = architecture.head_dim
        queries = architecture.num_heads // architecture.num_kv_heads * head_dim
        whole = torch.cat(list(shards)) if len(shards) > 1 else shards[0]
        by_group = whole.unflatten(0, (architecture.num_kv_heads, -1))
        parts = by_group.split([queries, head_dim, head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]
