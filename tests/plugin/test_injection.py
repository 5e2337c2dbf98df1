"""The injected loss adds its gradient at the tapped layer, once, in the backward pass."""

import pytest
import torch

from megatron_idpo.plugin.injection import inject_loss


def layers(seed: int = 0) -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.randn(3, 4)


def test_gradient_equals_that_of_the_summed_losses():
    first, second, x = layers()
    head = torch.nn.Linear(4, 1)
    parameters = [*first.parameters(), *second.parameters(), *head.parameters()]

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return head(hidden).square().sum()

    hidden = first(x)
    expected = torch.autograd.grad(second(hidden).sum() + loss(hidden), parameters)
    hidden = first(x)
    output = second(hidden)
    injected = inject_loss(output, hidden, loss)
    assert torch.equal(injected, output)
    injected.sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient)


def test_loss_runs_once_and_only_in_the_backward_pass():
    first, second, x = layers()
    seen: list[tuple[bool, bool, bool]] = []

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), hidden.requires_grad, hidden.is_leaf))
        return hidden.sum()

    hidden = first(x)
    output = inject_loss(second(hidden), hidden, loss)
    assert not seen
    output.sum().backward()
    assert seen == [(True, True, True)], "with gradients enabled, on a detached hidden state"


def test_several_taps_and_a_tap_at_the_output():
    first, second, x = layers()
    a = first(x)
    b = second(a)
    a_grad, b_grad = torch.autograd.grad(
        (b * 2).sum() + a.square().sum() + b.square().sum(), (a, b)
    )
    a = first(x)
    a.retain_grad()
    b = second(a)
    b.retain_grad()
    output = inject_loss(b, a, lambda hidden: hidden.square().sum())
    output = inject_loss(output, b, lambda hidden: hidden.square().sum())
    (output * 2).sum().backward()
    assert torch.allclose(a.grad, a_grad)
    assert torch.allclose(b.grad, b_grad)


def test_loss_over_no_pairs_gives_a_zero_gradient():
    first, second, x = layers()
    hidden = first(x)
    output = inject_loss(second(hidden), hidden, lambda hidden: hidden[:0].sum())
    output.backward(torch.zeros_like(output))
    assert first.weight.grad is not None and not first.weight.grad.any()


def test_each_micro_batch_uses_its_own_loss():
    """Two micro-batches forward, then both backward, as a pipeline does."""
    first, second, x = layers()
    outputs = []
    for factor in (1.0, 10.0):
        hidden = first(x)
        outputs.append(
            inject_loss(second(hidden), hidden, lambda h, factor=factor: (factor * h).sum())
        )
    gradients = []
    for output in outputs:
        first.zero_grad()
        output.backward(torch.zeros_like(output))
        gradients.append(first.bias.grad.clone())
    assert torch.allclose(gradients[1], 10 * gradients[0])


def test_output_without_gradient_is_rejected():
    with pytest.raises(AssertionError, match="needs no gradient"):
        inject_loss(torch.zeros(2), torch.zeros(2), lambda hidden: hidden.sum())
