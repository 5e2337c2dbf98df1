"""The products of an adapter against autograd, and the memory they keep for the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.mcore.lora.products import WHOLE, LowRank, add_low_rank, dropout_linear

# fp64: only rounding errors.
ABSOLUTE = 1e-12

TOKENS, INPUTS, OUTPUTS, RANK = 7, 6, 10, 2
PARTS = (
    (slice(0, 3), 0, slice(0, 3)),
    (slice(5, 10), 1, slice(0, 5)),
    (slice(3, 5), 0, slice(3, 5)),
)
"""Two matrices with 5 rows each, in 10 output features; the first one's are not adjacent."""


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def autograd_sum(
    output: Tensor, low_rank: Tensor, ups: list[Tensor], scaling: float, parts: Any
) -> Tensor:
    added = torch.zeros(TOKENS, OUTPUTS, dtype=torch.float64)
    width = low_rank.shape[1] // len(ups)
    for features, index, rows in parts:
        columns = low_rank[:, index * width : (index + 1) * width]
        added = added.index_copy(1, torch.arange(OUTPUTS)[features], columns @ ups[index][rows].t())
    return output + scaling * added[:, None]


@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize(("parts", "heights"), [(WHOLE, (OUTPUTS,)), (PARTS, (5, 5))])
def test_sum_and_gradients_match_autograd(parts, heights, scaling):
    output, low_rank = (
        random_tensor(TOKENS, 1, OUTPUTS),
        random_tensor(TOKENS, RANK * len(heights), seed=1),
    )
    ups = [random_tensor(height, RANK, seed=2 + n) for n, height in enumerate(heights)]
    weights = random_tensor(TOKENS, 1, OUTPUTS, seed=9).detach()
    inputs = [output, low_rank, *ups]
    expected = autograd_sum(output, low_rank, ups, scaling, parts)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    actual = add_low_rank(output * 1, LowRank(low_rank, ups, scaling, parts))
    assert (actual - expected).abs().max() <= ABSOLUTE
    gradients = torch.autograd.grad((actual * weights).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() <= ABSOLUTE


def test_adds_in_place_to_an_output_that_autograd_treats_as_a_view():
    """megatron-core's all-reduce over one rank returns its input."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    output = Identity.apply(random_tensor(TOKENS, 1, OUTPUTS) * 1)
    before = output.detach().clone()
    low_rank, up = random_tensor(TOKENS, RANK, seed=1), random_tensor(OUTPUTS, RANK, seed=2)
    actual = add_low_rank(output, LowRank(low_rank, [up], 1.0, WHOLE))
    assert actual.data_ptr() == output.data_ptr()
    assert (actual - before - (low_rank @ up.t())[:, None]).abs().max() <= ABSOLUTE
    actual.sum().backward()
    assert low_rank.grad is not None and up.grad is not None


def test_adapters_get_gradients_if_the_output_needs_none():
    low_rank, up = random_tensor(TOKENS, RANK, seed=1), random_tensor(OUTPUTS, RANK, seed=2)
    output = torch.zeros(TOKENS, 1, OUTPUTS).double()
    actual = add_low_rank(output, LowRank(low_rank, [up], 1.0, WHOLE))
    actual.sum().backward()
    assert (up.grad - low_rank.sum(0)).abs().max() <= ABSOLUTE


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("num_downs", [1, 3])
def test_dropout_linear_matches_autograd(needs_gradient, num_downs):
    inputs = random_tensor(TOKENS, INPUTS).detach().requires_grad_(needs_gradient)
    downs = [random_tensor(RANK, INPUTS, seed=1 + n) for n in range(num_downs)]
    torch.default_generator.manual_seed(3)
    masks = torch.native_dropout(torch.ones(num_downs, TOKENS, INPUTS).double(), 0.4, True)[0]
    assert all(0 < (mask == 0).sum() < mask.numel() for mask in masks)
    assert num_downs == 1 or not torch.equal(masks[0], masks[1])
    parts = [(inputs * mask) @ down.t() for mask, down in zip(masks, downs, strict=True)]
    expected = torch.cat(parts, dim=1)
    expected.square().sum().backward()
    input_grad, down_grads = inputs.grad, [down.grad for down in downs]
    for tensor in (inputs, *downs):
        tensor.grad = None
    torch.default_generator.manual_seed(3)
    actual = dropout_linear(inputs, downs, 0.4)
    assert (actual - expected).abs().max() <= ABSOLUTE
    actual.square().sum().backward()
    for down, down_grad in zip(downs, down_grads, strict=True):
        assert (down.grad - down_grad).abs().max() <= ABSOLUTE
    assert (inputs.grad is None) == (not needs_gradient)
    if needs_gradient:
        assert (inputs.grad - input_grad).abs().max() <= ABSOLUTE


def kept_bytes(run: Any) -> int:
    """Bytes saved for the backward pass, each storage counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_memory_kept_for_the_backward_pass_is_minimal():
    inputs, downs = (
        random_tensor(TOKENS, INPUTS),
        [random_tensor(RANK, INPUTS, seed=n) for n in (1, 2, 3)],
    )
    downs_bytes = sum(down.nbytes for down in downs)
    results: list[Tensor] = []  # kept alive, so that no memory is reused
    with_masks = kept_bytes(lambda: results.append(dropout_linear(inputs, downs, 0.4)))
    assert with_masks == inputs.nbytes + 3 * inputs.numel() + downs_bytes
    output, low_rank, up = (
        random_tensor(TOKENS, OUTPUTS),
        random_tensor(TOKENS, RANK),
        random_tensor(OUTPUTS, RANK),
    )
    copy = output * 1
    part = LowRank(low_rank, [up], 0.5, WHOLE)
    adding = kept_bytes(lambda: results.append(add_low_rank(copy, part)))
    assert adding == low_rank.nbytes + up.nbytes
