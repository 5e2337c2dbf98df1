"""The products of an adapter against plain arithmetic, and what they keep for the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.mcore.lora_products import WHOLE, add_low_rank, dropped_linear

# fp64, so that nothing but a mistake shows.
ABSOLUTE = 1e-12

TOKENS, INPUTS, OUTPUTS, RANK = 7, 6, 10, 4
PARTS = ((slice(0, 3), slice(0, 2)), (slice(5, 10), slice(2, 4)), (slice(3, 5), slice(0, 2)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def zero_outside(up: Tensor, parts: Any) -> Tensor:
    mask = torch.zeros_like(up)
    for rows, columns in parts:
        mask[rows, columns] = 1
    return (up * mask).detach().requires_grad_()


@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize("parts", [WHOLE, PARTS])
def test_the_sum_and_its_gradients(parts, scaling):
    given = [numbers(TOKENS, 1, OUTPUTS), numbers(TOKENS, RANK, seed=1)]
    up = zero_outside(numbers(OUTPUTS, RANK, seed=2), parts)
    weights = numbers(TOKENS, 1, OUTPUTS, seed=3).detach()
    expected = given[0] + scaling * (given[1] @ up.t())[:, None]
    (expected * weights).sum().backward()
    truth = [one.grad.clone() for one in (*given, up)]
    for one in (*given, up):
        one.grad = None
    found = add_low_rank(given[0] * 1, given[1], up, scaling, parts)
    assert (found - expected).abs().max() <= ABSOLUTE
    (found * weights).sum().backward()
    truth[2] = zero_outside(truth[2], parts)
    for one, gradient in zip((*given, up), truth, strict=True):
        assert (one.grad - gradient).abs().max() <= ABSOLUTE


def test_it_adds_in_place_also_to_what_a_function_passed_on():
    """megatron-core's reduction over one rank returns its input, which autograd calls a view."""

    class PassOn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, one: Tensor) -> Tensor:
            return one

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    output = PassOn.apply(numbers(TOKENS, 1, OUTPUTS) * 1)
    before = output.detach().clone()
    low_rank, up = numbers(TOKENS, RANK, seed=1), numbers(OUTPUTS, RANK, seed=2)
    found = add_low_rank(output, low_rank, up, 1.0, WHOLE)
    assert found.data_ptr() == output.data_ptr()
    assert (found - before - (low_rank @ up.t())[:, None]).abs().max() <= ABSOLUTE
    found.sum().backward()
    assert low_rank.grad is not None and up.grad is not None


def test_it_reaches_adapters_of_an_output_that_needs_no_gradient():
    low_rank, up = numbers(TOKENS, RANK, seed=1), numbers(OUTPUTS, RANK, seed=2)
    found = add_low_rank(torch.zeros(TOKENS, 1, OUTPUTS).double(), low_rank, up, 1.0, WHOLE)
    found.sum().backward()
    assert (up.grad - low_rank.sum(0)).abs().max() <= ABSOLUTE


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_dropout_before_a_linear(needs_gradient):
    given = numbers(TOKENS, INPUTS).detach().requires_grad_(needs_gradient)
    down = numbers(RANK, INPUTS, seed=1)
    torch.default_generator.manual_seed(3)
    mask = torch.native_dropout(torch.ones(TOKENS, INPUTS).double(), 0.4, True)[0]
    assert 0 < (mask == 0).sum() < mask.numel()
    expected = (given * mask) @ down.t()
    expected.square().sum().backward()
    truth = [one.grad for one in (given, down)]
    given.grad = down.grad = None
    torch.default_generator.manual_seed(3)
    found = dropped_linear(given, down, 0.4)
    assert (found - expected).abs().max() <= ABSOLUTE
    found.square().sum().backward()
    assert (down.grad - truth[1]).abs().max() <= ABSOLUTE
    assert (given.grad is None) == (not needs_gradient)
    if needs_gradient:
        assert (given.grad - truth[0]).abs().max() <= ABSOLUTE


def kept_bytes(run: Any) -> int:
    """Bytes kept for the backward pass, each storage counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_little_is_kept_for_the_backward_pass():
    given, downs = numbers(TOKENS, INPUTS), [numbers(RANK, INPUTS, seed=n) for n in (1, 2, 3)]
    ups = sum(down.nbytes for down in downs)
    results: list[Tensor] = []  # kept alive, so that no memory is used twice
    with_masks = kept_bytes(lambda: results.extend(dropped_linear(given, d, 0.4) for d in downs))
    assert with_masks == given.nbytes + 3 * given.numel() + ups
    output, low_rank, up = (numbers(TOKENS, OUTPUTS), numbers(TOKENS, RANK), numbers(OUTPUTS, RANK))
    copy = output * 1
    adding = kept_bytes(lambda: results.append(add_low_rank(copy, low_rank, up, 0.5, WHOLE)))
    assert adding == low_rank.nbytes + up.nbytes
