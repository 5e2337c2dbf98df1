"""A stage's own loss, without a word to the schedule.

One identity function on a chunk's output. Its forward keeps a tapped hidden state and how to turn
it into a loss; its backward, which a stock schedule reaches just before the rest of this micro-
batch's backward, computes the loss, takes its gradient and lets it join at the tapped layer.
So the head runs once, and logits of one micro-batch at a time exist.

That a stage-local loss needs only the usual pipeline messages is EE-LLM's finding (Chen et al.
2023, arXiv 2312.04916); deferring the head into the backward pass is theirs too.
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
        ctx.save_for_backward(hidden)
        ctx.evaluate = evaluate
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (saved,) = ctx.saved_tensors
        hidden = saved.detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.evaluate(hidden)
        # Parameters of a trainable head accumulate their gradients here, through the same
        # AccumulateGrad nodes (and DDP hooks) as everywhere else.
        torch.autograd.backward(loss)
        return grad_output, hidden.grad, None


def inject_loss(output: Tensor, hidden: Tensor, evaluate: Evaluate) -> Tensor:
    """`output`, with the gradient of `evaluate(hidden)` joining in its backward pass.

    Args:
        output: what the chunk passes on; must require a gradient, or nothing would ever run.
        hidden: a tapped layer's output; may be `output` itself.
        evaluate: runs in the backward pass, with gradients enabled. Its collectives are issued at
            the same point of the schedule on all ranks of a stage.

    Returns:
        The same values; the caller makes it viewless before it is sent.
    """
    assert output.requires_grad, "a tap on a chunk whose output needs no gradient never runs"
    injected: Tensor = _Injected.apply(output, hidden, evaluate)
    return injected
