"""Adapters of one fused linear: whose rows are whose, which ranks draw which dropout masks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

HIDDEN, TOKENS, DROPOUT = 64, 32, 0.25


def slices_and_counts() -> tuple[list[slice], ...]:
    from megatron_idpo.mcore.lora.linear import FusedRows

    rows = FusedRows(2, {"q_proj": 4, "k_proj": 2, "v_proj": 2})
    assert (rows.rows("q_proj"), rows.rows("v_proj")) == (8, 4)
    return tuple(rows.slices(name) for name in rows.group_rows)


@pytest.mark.distributed
def test_rows_of_grouped_queries(workers):
    ((q, k, v),) = workers.run(slices_and_counts, 1)
    assert q == [slice(0, 4), slice(8, 12)]
    assert k == [slice(4, 6), slice(12, 14)]
    assert v == [slice(6, 8), slice(14, 16)]


def layer_of(layout: Layout, model: dict[str, Any], **numbers: Any) -> tuple[Any, Any]:
    """The first layer's adapters by linear, and their chunk."""
    from megatron_idpo.mcore.lora.chunk import FUSED, freeze, insert_adapters
    from megatron_idpo.mcore.lora.linear import LoraHyperparams
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    options = ModelOptions(dtype=numbers.pop("dtype", torch.float32))
    start_layout(layout, seed=1)
    architecture = Architecture.from_hf(tiny_hf_config("llama", **model))
    chunk = build_model(architecture, layout, options)[0]
    freeze(chunk)
    targets = numbers.pop("targets", [name for fused in FUSED.values() for name in fused])
    adapters = insert_adapters(
        chunk, targets, LoraHyperparams(**{"scaling": 1.0, "dropout": 0.0, **numbers})
    )
    return adapters.layers[0], chunk


def masks(layout: Layout, training: bool = True) -> dict[str, Tensor]:
    """The mask of each projection: what A = 1 makes of ones, twice."""
    layer, chunk = layer_of(layout, {}, rank=2 * HIDDEN, dropout=DROPOUT)
    chunk.train(training)
    found = {}
    for adapters in layer.values():
        inputs = adapters.linear.weight.shape[1]
        for name in adapters.targets:
            adapters.down(name).data.zero_()[:inputs] = torch.eye(inputs)
        for draw in (0, 1):
            low_rank = adapters._low_rank(torch.ones(TOKENS, inputs)).unflatten(1, (-1, 2 * HIDDEN))
            for number, name in enumerate(adapters.targets):
                found[f"{name}{draw}"] = low_rank[:, number, :inputs].detach()
    return found


LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_masks_are_each_projections_and_each_steps_own(layout, workers):
    for found in workers.run(masks, layout.model_ranks, layout):
        for name, mask in found.items():
            kept = mask != 0
            assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / (1 - DROPOUT)))
            # Of 2048 and more draws: 6 standard deviations.
            assert kept.float().mean() == pytest.approx(1 - DROPOUT, abs=0.06), name
        alike = [name for name in found if found[name].shape == found["q_proj0"].shape]
        for number, name in enumerate(alike):
            assert not any(torch.equal(found[name], found[other]) for other in alike[:number])


@pytest.mark.distributed
def test_ranks_with_the_same_input_draw_the_same_mask(workers):
    """Column-parallel linears without sequence parallelism; the others' inputs are different."""
    row_parallel = ("o_proj", "down_proj")
    for name, same in (("TP2", True), ("TP2-SP", False)):
        one, other = workers.run(masks, 2, LAYOUTS[name])
        for projection, mask in one.items():
            is_same = same and not projection.startswith(row_parallel)
            assert torch.equal(mask, other[projection]) == is_same, projection


@pytest.mark.distributed
def test_evaluation_drops_nothing(workers):
    for found in workers.run(masks, 2, LAYOUTS["TP2"], training=False):
        assert all(mask.eq(1).all() for mask in found.values())


def products(model: dict[str, Any], targets: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    """For each linear: in how many products, and how far from the projections one by one."""
    layer, _ = layer_of(Layout(), model, rank=2, scaling=0.5, targets=targets, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, adapters in layer.items():
        for parameter in adapters.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        weight = adapters.linear.weight
        given = torch.randn(TOKENS, 1, weight.shape[1], generator=generator).to(dtype)
        output = torch.zeros(TOKENS, 1, weight.shape[0], dtype=dtype)
        result = adapters(given, output)
        expected = torch.zeros(TOKENS, weight.shape[0], dtype=dtype)
        for target in adapters.targets:
            delta = 0.5 * given[:, 0] @ adapters.down(target).t() @ adapters.up(target).t()
            height = adapters.rows.group_rows[target]
            for number, rows in enumerate(adapters.rows.slices(target)):
                expected[:, rows] = delta[:, number * height : (number + 1) * height]
        error = (result[:, 0] - expected).norm() / expected.norm()
        found[name] = (len(adapters._parts), float(error))
    return found


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
# Of sums in another order; bf16 has 8 bits, and rounds the low-rank values too.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.mark.distributed
@pytest.mark.parametrize(("model", "letters", "dtype", "parts"), PRODUCTS)
def test_the_products_of_fused_projections(model, letters, dtype, parts, workers):
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    names |= {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}
    targets = tuple(names[letter] for letter in letters)
    (found,) = workers.run(products, 1, model, targets, dtype)
    assert {name: count for name, (count, _) in found.items()} == parts
    assert all(error <= RELATIVE[dtype] for _, error in found.values()), found
