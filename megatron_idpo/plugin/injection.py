"""Stage-local loss on unmodified pipeline schedules.

A pipeline stage that taps a layer has a loss that the schedule does not know about. `inject_loss`
attaches it to the chunk's output as an identity function: forward saves the tapped hidden state and
the loss function; backward, which the schedule runs just before the rest of the micro-batch's
backward, evaluates the loss and returns its gradient at the tapped layer. So the head runs once per
tap, and logits of one micro-batch at a time exist.

That a stage-local loss needs only the pipeline's own messages is a result of EE-LLM (Chen et al.
2023, arXiv 2312.04916), which also defers the head into the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], Tensor]
"""From a tapped hidden state to the loss, a scalar that is already scaled for the schedule."""


class _Injected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden: Tensor, evaluate: Evaluate) -> Tensor:
        # `hidden` is an input, so autograd adds the gradient that backward returns for it to the
        # one that arrives through the layers above the tap.
        ctx.save_for_backward(hidden)
        ctx.evaluate = evaluate
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (saved,) = ctx.saved_tensors
        # A leaf: the backward below stops here instead of running the chunk's layers, which the
        # schedule's own backward does once, with the sum of both gradients.
        hidden = saved.detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.evaluate(hidden)
        # Parameters of a trainable head accumulate their gradients here, through the same
        # AccumulateGrad nodes (and DDP hooks) as everywhere else.
        torch.autograd.backward(loss)
        return grad_output, hidden.grad, None


def inject_loss(output: Tensor, hidden: Tensor, evaluate: Evaluate) -> Tensor:
    """`output`, whose backward pass also adds the gradient of `evaluate(hidden)` at `hidden`.

    Args:
        output: the chunk's output. It must require a gradient, or backward would never run.
        hidden: a tapped layer's output; may be `output` itself.
        evaluate: runs in the backward pass, with gradients enabled. All ranks of a stage reach it
            at the same point of the schedule, so its collectives match.

    Returns:
        The same values. The caller makes the tensor viewless before it is sent.
    """
    assert output.requires_grad, "a tap on a chunk whose output needs no gradient never runs"
    injected: Tensor = _Injected.apply(output, hidden, evaluate)
    return injected
