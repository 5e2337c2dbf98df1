"""The two products of a low-rank adapter, with no more kept for the backward pass than it needs.

T  positions   I  input features   O  output features   R  low-rank features
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

Part = tuple[slice, slice]
"""Rows and columns of `up_OR` whose product is added by itself; no two parts share rows."""

WHOLE: tuple[Part, ...] = ((slice(None), slice(None)),)
"""All of it in one product."""


def add_low_rank(
    output_T1O: Tensor, low_rank_TR: Tensor, up_OR: Tensor, scaling: float, parts: Sequence[Part]
) -> Tensor:
    """`output += scaling * low_rank @ up.T`, in place.

    Args:
        output_T1O: contiguous, of any leading shape with T elements; fresh from a function that
            does not keep it for its own backward pass.
        low_rank_TR: kept for the backward pass.
        up_OR: likewise.
        scaling: a factor.
        parts: outside of them `up_OR` is zero and stays without a gradient.

    Returns:
        `output_T1O`, with the low-rank input behind it in the graph.
    """
    added = _AddLowRank.apply(output_T1O, low_rank_TR, up_OR, scaling, parts)
    return cast(Tensor, added)


def dropped_linear(input_TI: Tensor, down_RI: Tensor, dropout: float) -> Tensor:
    """`linear(dropout(input), down)`, keeping the input and a mask of one byte per element.

    The input is kept once for all adapters on it; torch's dropout would keep its result, one for
    each. Draws from the current default generator.
    """
    return cast(Tensor, _DroppedLinear.apply(input_TI, down_RI, dropout))


class _AddLowRank(torch.autograd.Function):
    """In place, but not declared so (`mark_dirty`).

    The output may come from a function that returns its input (megatron-core's all-reduce), which
    autograd takes for a view, and refuses to modify although nothing needs its old value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output_T1O: Tensor,
        low_rank_TR: Tensor,
        up_OR: Tensor,
        scaling: float,
        parts: Sequence[Part],
    ) -> Tensor:
        flat_TO = output_T1O.view(-1, output_T1O.shape[-1])
        for rows, columns in parts:
            flat_TO[:, rows].addmm_(
                low_rank_TR[:, columns], up_OR[rows, columns].t(), alpha=scaling
            )
        ctx.save_for_backward(low_rank_TR, up_OR)
        ctx.scaling, ctx.parts = scaling, parts
        return output_T1O

    @staticmethod
    def backward(ctx: Any, grad_T1O: Tensor) -> tuple[Tensor | None, ...]:
        low_rank_TR, up_OR = ctx.saved_tensors
        grad_TO = grad_T1O.reshape(-1, grad_T1O.shape[-1])
        if ctx.parts == WHOLE:
            grad_low_TR, grad_up_OR = grad_TO @ up_OR, grad_TO.t() @ low_rank_TR
        else:
            grad_low_TR, grad_up_OR = torch.zeros_like(low_rank_TR), torch.zeros_like(up_OR)
            for rows, columns in ctx.parts:
                grad_low_TR[:, columns].addmm_(grad_TO[:, rows], up_OR[rows, columns])
                grad_up_OR[rows, columns] = grad_TO[:, rows].t() @ low_rank_TR[:, columns]
        if ctx.scaling != 1.0:
            grad_low_TR.mul_(ctx.scaling)
            grad_up_OR.mul_(ctx.scaling)
        return grad_T1O, grad_low_TR, grad_up_OR, None, None


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, down_RI: Tensor, dropout: float) -> Tensor:
        dropped_TI, mask_TI = torch.native_dropout(input_TI, dropout, train=True)
        ctx.save_for_backward(input_TI, mask_TI, down_RI)
        ctx.scale = 1 / (1 - dropout)
        return dropped_TI @ down_RI.t()

    @staticmethod
    def backward(ctx: Any, grad_TR: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, mask_TI, down_RI = ctx.saved_tensors
        # The gradient of dropout is dropout with the same mask.
        grad_input_TI = None
        if ctx.needs_input_grad[0]:
            grad_input_TI = torch.ops.aten.native_dropout_backward(
                grad_TR @ down_RI, mask_TI, ctx.scale
            )
        dropped_TI = torch.ops.aten.native_dropout_backward(input_TI, mask_TI, ctx.scale)
        return grad_input_TI, grad_TR.t() @ dropped_TI, None
