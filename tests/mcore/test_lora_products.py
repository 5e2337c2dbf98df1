"""The products of an adapter against plain arithmetic, and what they keep for the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.mcore.lora.products import WHOLE, add_low_rank, dropout_linear

# fp64, so that nothing but a mistake shows.
ABSOLUTE = 1e-12

TOKENS, INPUTS, OUTPUTS, RANK = 7, 6, 10, 2
PARTS = (
    (slice(0, 3), 0, slice(0, 3)),
    (slice(5, 10), 1, slice(0, 5)),
    (slice(3, 5), 0, slice(3, 5)),
)
"""Of two matrices with 5 rows each, in 10 output features: the first's are not neighbours."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def plain(
    output: Tensor, low_rank: Tensor, ups: list[Tensor], scaling: float, parts: Any
) -> Tensor:
    added = torch.zeros(TOKENS, OUTPUTS, dtype=torch.float64)
    width = low_rank.shape[1] // len(ups)
    for features, number, rows in parts:
        columns = low_rank[:, number * width : (number + 1) * width]
        added = added.index_copy(
            1, torch.arange(OUTPUTS)[features], columns @ ups[number][rows].t()
        )
    return output + scaling * added[:, None]


@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize(("parts", "heights"), [(WHOLE, (OUTPUTS,)), (PARTS, (5, 5))])
def test_the_sum_and_its_gradients(parts, heights, scaling):
    output, low_rank = numbers(TOKENS, 1, OUTPUTS), numbers(TOKENS, RANK * len(heights), seed=1)
    ups = [numbers(height, RANK, seed=2 + n) for n, height in enumerate(heights)]
    weights = numbers(TOKENS, 1, OUTPUTS, seed=9).detach()
    given = [output, low_rank, *ups]
    expected = plain(output, low_rank, ups, scaling, parts)
    truth = torch.autograd.grad((expected * weights).sum(), given)
    found = add_low_rank(output * 1, low_rank, ups, scaling, parts)
    assert (found - expected).abs().max() <= ABSOLUTE
    gradients = torch.autograd.grad((found * weights).sum(), given)
    for gradient, one in zip(gradients, truth, strict=True):
        assert (gradient - one).abs().max() <= ABSOLUTE


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
    found = add_low_rank(output, low_rank, [up], 1.0, WHOLE)
    assert found.data_ptr() == output.data_ptr()
    assert (found - before - (low_rank @ up.t())[:, None]).abs().max() <= ABSOLUTE
    found.sum().backward()
    assert low_rank.grad is not None and up.grad is not None


def test_it_reaches_adapters_of_an_output_that_needs_no_gradient():
    low_rank, up = numbers(TOKENS, RANK, seed=1), numbers(OUTPUTS, RANK, seed=2)
    found = add_low_rank(torch.zeros(TOKENS, 1, OUTPUTS).double(), low_rank, [up], 1.0, WHOLE)
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
    found = dropout_linear(given, down, 0.4)
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
    with_masks = kept_bytes(lambda: results.extend(dropout_linear(given, d, 0.4) for d in downs))
    assert with_masks == given.nbytes + 3 * given.numel() + ups
    output, low_rank, up = (numbers(TOKENS, OUTPUTS), numbers(TOKENS, RANK), numbers(OUTPUTS, RANK))
    copy = output * 1
    adding = kept_bytes(lambda: results.append(add_low_rank(copy, low_rank, [up], 0.5, WHOLE)))
    assert adding == low_rank.nbytes + up.nbytes
