"""Adapters of one fused linear: row layout, dropout masks, products."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

HIDDEN, TOKENS, DROPOUT = 64, 32, 0.25


def query_group_slices() -> tuple[list[slice], ...]:
    from megatron_idpo.mcore.lora.linear import FusedRows

    rows = FusedRows(2, {"q_proj": 4, "k_proj": 2, "v_proj": 2})
    assert (rows.rows("q_proj"), rows.rows("v_proj")) == (8, 4)
    return tuple(rows.slices(name) for name in rows.group_rows)


@pytest.mark.distributed
def test_rows_alternate_between_projections_within_query_groups(workers):
    ((q, k, v),) = workers.run(query_group_slices, 1)
    assert q == [slice(0, 4), slice(8, 12)]
    assert k == [slice(4, 6), slice(12, 14)]
    assert v == [slice(6, 8), slice(14, 16)]


def build_layer(layout: Layout, model: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """The first layer's adapters by linear, and their chunk."""
    from megatron_idpo.mcore.lora.chunk import FUSED, freeze, insert_adapters
    from megatron_idpo.mcore.lora.linear import LoraHyperparams
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    options = ModelOptions(dtype=settings.pop("dtype", torch.float32))
    start_layout(layout, seed=1)
    architecture = Architecture.from_hf(tiny_hf_config("llama", **model))
    chunk = build_model(architecture, layout, options)[0]
    freeze(chunk)
    targets = settings.pop("targets", [name for fused in FUSED.values() for name in fused])
    adapters = insert_adapters(
        chunk, targets, LoraHyperparams(**{"scaling": 1.0, "dropout": 0.0, **settings})
    )
    return adapters.layers[0], chunk


def masks(layout: Layout, training: bool = True) -> dict[str, Tensor]:
    """Two dropout masks of each projection: the output of A = identity for an input of ones."""
    layer, chunk = build_layer(layout, {}, rank=2 * HIDDEN, dropout=DROPOUT)
    chunk.train(training)
    drawn = {}
    for adapters in layer.values():
        inputs = adapters.linear.weight.shape[1]
        for name in adapters.targets:
            adapters.down(name).data.zero_()[:inputs] = torch.eye(inputs)
        for draw in (0, 1):
            low_rank = adapters._low_rank(torch.ones(TOKENS, inputs)).unflatten(1, (-1, 2 * HIDDEN))
            for index, name in enumerate(adapters.targets):
                drawn[f"{name}{draw}"] = low_rank[:, index, :inputs].detach()
    return drawn


LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_projection_and_draw_has_a_different_mask(layout, workers):
    for drawn in workers.run(masks, layout.model_ranks, layout):
        for name, mask in drawn.items():
            kept = mask != 0
            assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / (1 - DROPOUT)))
            # 6 standard deviations of the mean of 2048 draws.
            assert kept.float().mean() == pytest.approx(1 - DROPOUT, abs=0.06), name
        comparable = [name for name in drawn if drawn[name].shape == drawn["q_proj0"].shape]
        for one, other in combinations(comparable, 2):
            assert not torch.equal(drawn[one], drawn[other])


@pytest.mark.distributed
def test_ranks_with_the_same_input_draw_the_same_mask(workers):
    """Column-parallel linears without sequence parallelism; other linears' inputs differ."""
    row_parallel = ("o_proj", "down_proj")
    for name, same in (("TP2", True), ("TP2-SP", False)):
        one, other = workers.run(masks, 2, LAYOUTS[name])
        for projection, mask in one.items():
            is_same = same and not projection.startswith(row_parallel)
            assert torch.equal(mask, other[projection]) == is_same, projection


@pytest.mark.distributed
def test_evaluation_has_no_dropout(workers):
    for drawn in workers.run(masks, 2, LAYOUTS["TP2"], training=False):
        assert all(mask.eq(1).all() for mask in drawn.values())


def products(model: dict[str, Any], targets: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    """For each linear: the number of products, and the error against separate projections."""
    from megatron_idpo.mcore.lora.products import add_low_rank

    layer, _ = build_layer(Layout(), model, rank=2, scaling=0.5, targets=targets, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    results = {}
    for name, adapters in layer.items():
        for parameter in adapters.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        weight = adapters.linear.weight
        inputs = torch.randn(TOKENS, 1, weight.shape[1], generator=generator).to(dtype)
        output = torch.zeros(TOKENS, 1, weight.shape[0], dtype=dtype)
        result = add_low_rank(output, adapters(inputs))
        expected = torch.zeros(TOKENS, weight.shape[0], dtype=dtype)
        for target in adapters.targets:
            delta = 0.5 * inputs[:, 0] @ adapters.down(target).t() @ adapters.up(target).t()
            height = adapters.rows.group_rows[target]
            for group, rows in enumerate(adapters.rows.slices(target)):
                expected[:, rows] = delta[:, group * height : (group + 1) * height]
        error = (result[:, 0] - expected).norm() / expected.norm()
        results[name] = (len(adapters._parts), float(error))
    return results


PRODUCTS = [
    ({}, "qkvo", torch.float32, {"linear_qkv": 12, "linear_proj": 1}),
    ({"num_key_value_heads": 8}, "qkv", torch.float32, {"linear_qkv": 1}),
    ({"num_key_value_heads": 8}, "v", torch.float32, {"linear_qkv": 8}),
    ({"num_key_value_heads": 8}, "qkv", torch.bfloat16, {"linear_qkv": 1}),
    ({}, "qk", torch.bfloat16, {"linear_qkv": 8}),
    ({}, "gud", torch.float32, {"linear_fc1": 2, "linear_fc2": 1}),
    ({}, "u", torch.float32, {"linear_fc1": 1}),
    ({}, "g", torch.bfloat16, {"linear_fc1": 1}),
]
# Sums in another order; bf16 (8 bits) also rounds the low-rank values.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.mark.distributed
@pytest.mark.parametrize(("model", "letters", "dtype", "parts"), PRODUCTS)
def test_products_match_separate_projections(model, letters, dtype, parts, workers):
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    names |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}
    targets = tuple(names[letter] for letter in letters)
    (results,) = workers.run(products, 1, model, targets, dtype)
    assert {name: count for name, (count, _) in results.items()} == parts
    assert all(error <= RELATIVE[dtype] for _, error in results.values()), results
