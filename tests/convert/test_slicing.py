"""Slicing rules: fill and merge invert each other, in the order of megatron-core."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idpo.convert import slicing
from megatron_idpo.convert.slicing import (
    ColumnsSplit,
    FusedGateUp,
    FusedQKV,
    Replicated,
    Shard,
    Slicing,
    VocabSplit,
)
from megatron_idpo.errors import CheckpointError


class Source:
    """Tensors in memory; records the number of elements of each read."""

    directory = Path("hf")

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.reads: list[int] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        part = self.tensors[name]
        part = part if rows is None else part[rows]
        part = part if columns is None else part[:, columns]
        self.reads.append(part.numel())
        return part.clone()


def fill(rule: Slicing, parameter: Tensor, source: Any, names: list[str], *layout: Any) -> None:
    for block in rule.blocks(parameter, source, names, *layout):
        block.read(source)


def numbered(*shape: int, start: int = 1) -> Tensor:
    size = int(torch.tensor(shape).prod())
    return torch.arange(start, start + size, dtype=torch.float32).view(shape)


def of(**sizes: int) -> Any:
    """The fields of an `Architecture` that the rules use."""
    return SimpleNamespace(**sizes)


def shards(
    rule: Slicing, source: Any, architecture: Any, size: int, shape: tuple[int, ...]
) -> list[Tensor]:
    """All ranks' parameters, NaN before they are filled, so that missing values are visible."""
    parameters = [torch.full(shape, torch.nan) for _ in range(size)]
    for rank, parameter in enumerate(parameters):
        fill(rule, parameter, source, list(source.tensors), architecture, Shard(rank, size))
    return parameters


SIZES = st.integers(1, 4)
blocks = st.sampled_from([1, 100, 1 << 20])


@settings(max_examples=40, deadline=None)
@given(
    tensor=SIZES,
    groups_per_rank=SIZES,
    queries_per_group=SIZES,
    head_dim=SIZES,
    hidden=st.integers(0, 3),
    block=blocks,
)
def test_fused_qkv_round_trips(tensor, groups_per_rank, queries_per_group, head_dim, hidden, block):
    groups = tensor * groups_per_rank
    heads = groups * queries_per_group
    architecture = of(num_heads=heads, num_kv_heads=groups, head_dim=head_dim)
    tail = (hidden,) if hidden else ()  # a bias has no columns
    whole = {
        "q": numbered(heads * head_dim, *tail),
        "k": numbered(groups * head_dim, *tail, start=10_000),
        "v": numbered(groups * head_dim, *tail, start=20_000),
    }
    source: Any = Source(**whole)
    rows = groups_per_rank * (queries_per_group + 2) * head_dim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "_BLOCK_BYTES", block)
        parts = shards(FusedQKV(), source, architecture, tensor, (rows, *tail))
    # Groups in order over all ranks; each is its queries, its key, its value.
    expected = []
    for group in range(groups):
        first = group * queries_per_group * head_dim
        expected.append(whole["q"][first : first + queries_per_group * head_dim])
        expected += [whole[name][group * head_dim : (group + 1) * head_dim] for name in "kv"]
    assert torch.equal(torch.cat(parts), torch.cat(expected))
    merged = FusedQKV().merge(parts, architecture)
    assert all(torch.equal(*pair) for pair in zip(merged, whole.values(), strict=True))
    assert sum(source.reads) == sum(one.numel() for one in whole.values())


@settings(max_examples=40, deadline=None)
@given(tensor=SIZES, rows_per_rank=SIZES, hidden=SIZES, block=blocks)
def test_fused_gate_and_up_round_trips(tensor, rows_per_rank, hidden, block):
    rows = tensor * rows_per_rank
    gate, up = numbered(rows, hidden), numbered(rows, hidden, start=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "_BLOCK_BYTES", block)
        parts = shards(
            FusedGateUp(), Source(gate=gate, up=up), of(), tensor, (2 * rows_per_rank, hidden)
        )
    for rank, part in enumerate(parts):
        mine = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        assert torch.equal(part, torch.cat([gate[mine], up[mine]]))
    merged = FusedGateUp().merge(parts, of())
    assert torch.equal(merged[0], gate) and torch.equal(merged[1], up)


@settings(max_examples=40, deadline=None)
@given(tensor=SIZES, rows=SIZES, columns_per_rank=SIZES, block=blocks)
def test_columns_round_trip(tensor, rows, columns_per_rank, block):
    whole = numbered(rows, tensor * columns_per_rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "_BLOCK_BYTES", block)
        parts = shards(ColumnsSplit(), Source(one=whole), of(), tensor, (rows, columns_per_rank))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    (merged,) = ColumnsSplit().merge(parts, of())
    assert torch.equal(merged, whole)


@settings(max_examples=60, deadline=None)
@given(tensor=SIZES, vocab_size=st.integers(1, 13), hidden=SIZES, block=blocks)
def test_padded_vocabulary_round_trips(tensor, vocab_size, hidden, block):
    """Any size over any ranks, also if the last ranks hold only padding."""
    whole = numbered(vocab_size, hidden)
    per_rank = -(-vocab_size // tensor)
    source: Any = Source(one=whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "_BLOCK_BYTES", block)
        parts = shards(VocabSplit(), source, of(), tensor, (per_rank, hidden))
    padded = torch.cat(parts)
    assert torch.equal(padded[:vocab_size], whole)
    assert not padded[vocab_size:].any()
    (merged,) = VocabSplit().merge(parts, of(vocab_size=vocab_size))
    assert torch.equal(merged, whole)
    assert sum(source.reads) == whole.numel()


def test_replicated_tensor_round_trips():
    whole = numbered(5)
    parts = shards(Replicated(), Source(norm=whole), of(), 3, (5,))
    assert all(torch.equal(part, whole) for part in parts)
    (merged,) = Replicated().merge(parts[:1], of())
    assert torch.equal(merged, whole)


def test_rank_reads_only_its_rows_in_blocks(monkeypatch):
    source: Any = Source(one=numbered(64, 8))
    monkeypatch.setattr(slicing, "_BLOCK_BYTES", 10 * 8 * 4)
    parameter = torch.empty(32, 8)
    fill(VocabSplit(), parameter, source, ["one"], of(), Shard(1, 2))
    assert torch.equal(parameter, source.tensors["one"][32:])
    assert source.reads == [80, 80, 80, 16]


def test_values_are_cast_to_the_parameters_dtype():
    parameter = torch.empty(4, 3, dtype=torch.bfloat16)
    source: Any = Source(one=torch.randn(4, 3))
    fill(VocabSplit(), parameter, source, ["one"], of(), Shard(0, 1))
    assert torch.equal(parameter, source.tensors["one"].bfloat16())


def test_sizes_that_do_not_divide_are_an_internal_error():
    with pytest.raises(AssertionError, match="7 over 2 ranks"):
        Shard(0, 2).of(7)
    with pytest.raises(AssertionError, match="3 rows of 8"):
        fill(
            VocabSplit(), torch.empty(3, 2), Source(one=numbered(8, 2)), ["one"], of(), Shard(0, 2)
        )


def test_value_beyond_the_parameters_dtype_is_refused():
    source: Any = Source(one=torch.tensor([1.0, 1e5]))
    with pytest.raises(CheckpointError, match=r"^hf: tensor 'one' .* infinite in torch\.float16"):
        fill(Replicated(), torch.empty(2).half(), source, ["one"], of(), Shard(0, 1))
