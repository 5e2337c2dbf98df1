"""Experts computed together equal megatron-core's, which are computed one after another."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

RELATIVE = 1e-5
"""fp32 sums in another order."""

TOKENS_PER_EXPERT = {"some": [3, 0, 5, 1], "none": [0, 0, 0, 0]}


def outputs_and_gradients(grouped: bool) -> dict[str, dict[str, Tensor | None]]:
    """By case: output, gradients of tokens and of all weights of one layer's experts."""
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.model.grouped_experts import GroupedExperts
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    architecture = Architecture.from_hf(tiny_hf_config("mixtral"))
    (chunk,) = build_model(architecture, Layout(), ModelOptions(grouped_experts=grouped))
    experts = chunk.decoder.layers[0].mlp.experts
    assert isinstance(experts, GroupedExperts) == grouped
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(experts.named_parameters()):
        parameter.data.normal_(std=0.2, generator=generator)
    results: dict[str, dict[str, Tensor | None]] = {}
    for case, counts in TOKENS_PER_EXPERT.items():
        tokens = torch.randn(sum(counts), 64, generator=generator).requires_grad_()
        probs = torch.rand(sum(counts), generator=generator).requires_grad_()
        output, _ = experts(tokens, torch.tensor(counts), probs)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        values: dict[str, Any] = {"output": output.detach(), "tokens": tokens.grad}
        values |= {"probs": probs.grad}
        for name, parameter in experts.named_parameters():
            values[name], parameter.grad = parameter.grad, None
        results[case] = values
    return results


def test_grouped_experts_equal_sequential_ones(workers):
    (ours,), (expected,) = (
        workers.run(outputs_and_gradients, 1, grouped) for grouped in (True, False)
    )
    for case, values in expected.items():
        assert ours[case].keys() == values.keys()
        for name, value in values.items():
            # DDP waits for a gradient of every weight, also of experts without tokens.
            assert value is not None and ours[case][name].shape == value.shape, (case, name)
            difference = (ours[case][name] - value).norm()
            assert difference <= RELATIVE * value.norm(), (case, name)
