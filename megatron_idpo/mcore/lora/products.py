"""The two matrix products of a low-rank adapter, with minimal memory kept for the backward pass.

T  positions   I  input features   O  output features   R  low-rank features
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

Part = tuple[slice, int, slice]
"""Output features, the index of the B matrix that contributes to them, and its rows."""

WHOLE: tuple[Part, ...] = ((slice(None), 0, slice(None)),)
"""One matrix that contributes to all output features."""


def add_low_rank(
    output_T1O: Tensor,
    low_rank_TR: Tensor,
    ups: Sequence[Tensor],
    scaling: float,
    parts: Sequence[Part],
) -> Tensor:
    """`output[:, features] += scaling * low_rank[:, columns] @ up[rows].T` for each part, in place.

    Args:
        output_T1O: contiguous, with any leading shape of T elements; the output of a function that
            does not save it for its own backward pass.
        low_rank_TR: the columns for each matrix, concatenated; saved for the backward pass.
        ups: B matrices `[O_p, r]`; saved too.
        scaling: a factor.
        parts: must not share output features, and must cover every row of every matrix.

    Returns:
        `output_T1O`, connected in the graph to the low-rank input and the matrices.
    """
    return cast(Tensor, _AddLowRank.apply(output_T1O, low_rank_TR, scaling, parts, *ups))


def dropout_linear(input_TI: Tensor, down_RI: Tensor, dropout: float) -> Tensor:
    """`linear(dropout(input), down)`; saves the input, and on a CPU a mask of one byte per element.

    All adapters of a linear save the same input; torch's dropout would save its output for each.
    Draws from the current default generator. On a GPU the backward pass draws the mask again, from
    the generator's state, instead of keeping it: seven masks per layer, each as wide as the input.
    """
    return cast(Tensor, _DroppedLinear.apply(input_TI, down_RI, dropout))


class _AddLowRank(torch.autograd.Function):
    """In place, but without `mark_dirty`.

    The output may come from a function that returns its input (megatron-core's all-reduce).
    Autograd treats that as a view and would reject the modification, although nothing needs the old
    value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output_T1O: Tensor,
        low_rank_TR: Tensor,
        scaling: float,
        parts: Sequence[Part],
        *ups: Tensor,
    ) -> Tensor:
        flat_TO = output_T1O.view(-1, output_T1O.shape[-1])
        low_ranks = low_rank_TR.split([up.shape[1] for up in ups], dim=1)
        for features, index, rows in parts:
            up_t = ups[index][rows].t()
            flat_TO[:, features].addmm_(low_ranks[index], up_t, alpha=scaling)
        ctx.save_for_backward(low_rank_TR, *ups)
        ctx.scaling, ctx.parts = scaling, parts
        return output_T1O

    @staticmethod
    def backward(ctx: Any, grad_T1O: Tensor) -> tuple[Tensor | None, ...]:
        low_rank_TR, *ups = ctx.saved_tensors
        grad_TO = grad_T1O.reshape(-1, grad_T1O.shape[-1])
        low_ranks = low_rank_TR.split([up.shape[1] for up in ups], dim=1)
        grad_lows: list[Tensor | None] = [None] * len(ups)
        grad_up_ts = [up.new_empty(up.shape[::-1]) for up in ups]
        for features, index, rows in ctx.parts:
            grad, up, grad_low = grad_TO[:, features], ups[index][rows], grad_lows[index]
            # Several parts may use the same columns of the low-rank input: their gradients add up.
            # Each row of B is in one part only, so its gradient is assigned.
            grad_lows[index] = grad @ up if grad_low is None else grad_low.addmm_(grad, up)
            # Transposed, because BLAS is faster for wide products than for tall ones.
            grad_up_ts[index][:, rows] = low_ranks[index].t() @ grad
        present = [grad_low for grad_low in grad_lows if grad_low is not None]
        grad_low_TR = torch.cat(present, dim=1) if len(present) > 1 else present[0]
        # Scale the small gradients, not the [T, O] one. Into the output it is passed unchanged.
        if ctx.scaling != 1.0:
            for grad in (grad_low_TR, *grad_up_ts):
                grad.mul_(ctx.scaling)
        return grad_T1O, grad_low_TR, None, None, *(grad.t() for grad in grad_up_ts)


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, down_RI: Tensor, dropout: float) -> Tensor:
        ctx.dropout = dropout
        ctx.mask_seed = _MaskSeed.now(input_TI.device) if input_TI.is_cuda else None
        dropped_TI, mask_TI = torch.native_dropout(input_TI, dropout, train=True)
        kept = (mask_TI,) if ctx.mask_seed is None else ()
        ctx.save_for_backward(input_TI, down_RI, *kept)
        return dropped_TI @ down_RI.t()

    @staticmethod
    def backward(ctx: Any, grad_TR: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, down_RI, *kept = ctx.saved_tensors
        scale = 1 / (1 - ctx.dropout)
        # The gradient of dropout is dropout with the same mask and scale. Applied to the input, it
        # also recomputes the dropped input, which is not saved.
        if ctx.mask_seed is None:
            (mask_TI,) = kept
            dropped_TI = torch.ops.aten.native_dropout_backward(input_TI, mask_TI, scale)
        else:
            with ctx.mask_seed.drawing_again():
                dropped_TI, mask_TI = torch.native_dropout(input_TI, ctx.dropout, train=True)
        grad_input_TI = None
        if ctx.needs_input_grad[0]:
            grad_input_TI = torch.ops.aten.native_dropout_backward(
                grad_TR @ down_RI, mask_TI, scale
            )
        return grad_input_TI, grad_TR.t() @ dropped_TI, None


@dataclass(frozen=True, slots=True)
class _MaskSeed:
    """The state of a CUDA generator before it draws a mask: two numbers, which the host knows.

    On a CPU the mask is kept instead: drawing is slow there, and the state is 5 kB.
    """

    generator: torch.Generator
    seed: int
    offset: int

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """Of the device's default generator, as it is now."""
        generator = torch.cuda.default_generators[device.index]
        return cls(generator, generator.initial_seed(), generator.get_offset())

    @contextmanager
    def drawing_again(self) -> Iterator[None]:
        """The generator in this state within the block, and in its own state afterwards."""
        seed, offset = self.generator.initial_seed(), self.generator.get_offset()
        self._set(self.seed, self.offset)
        try:
            yield
        finally:
            self._set(seed, offset)

    def _set(self, seed: int, offset: int) -> None:
        self.generator.manual_seed(seed)
        self.generator.set_offset(offset)
