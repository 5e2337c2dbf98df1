"""The two matrix products of a low-rank adapter, with minimal memory kept for the backward pass.

T  positions   I  input features   O  output features   R  low-rank features
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

Part = tuple[slice, int, slice]
"""Output features, the index of the B matrix that contributes to them, and its rows."""

WHOLE: tuple[Part, ...] = ((slice(None), 0, slice(None)),)
"""One matrix that contributes to all output features."""


class LowRank(NamedTuple):
    """The adapters' part of a linear's output, before the product with the B's.

    `output[:, features] += scaling * low_rank[:, columns] @ up[rows].T` for each part.
    """

    low_rank_TR: Tensor
    """The columns for each matrix, concatenated."""

    ups: Sequence[Tensor]
    """B matrices `[O_p, r]`."""

    scaling: float
    parts: Sequence[Part]
    """Must not share output features, and must cover every row of every matrix."""

    def add_to(self, output_TO: Tensor, *, beta: int = 1) -> None:
        """Add the product to an output, in place; `beta=0` overwrites its adapted features."""
        low_ranks = self._columns(self.low_rank_TR)
        for features, index, rows in self.parts:
            up_t = self.ups[index][rows].t()
            output_TO[:, features].addmm_(low_ranks[index], up_t, beta=beta, alpha=self.scaling)

    def gradients(self, grad_TO: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of `low_rank_TR` and of `ups` from that of the output."""
        grad_low_TR = torch.empty_like(self.low_rank_TR)
        low_ranks, grad_lows = self._columns(self.low_rank_TR), self._columns(grad_low_TR)
        grad_ups = [torch.empty_like(up) for up in self.ups]
        started: set[int] = set()
        for features, index, rows in self.parts:
            grad, up = grad_TO[:, features], self.ups[index][rows]
            # Several parts may use the same columns of the low-rank input: their gradients add up.
            # Each row of B is in one part only, so its gradient is assigned. The scale is part of
            # the small products; into the output the gradient is passed unchanged.
            grad_lows[index].addmm_(grad, up, beta=int(index in started), alpha=self.scaling)
            _product_into(grad_ups[index][rows], grad, low_ranks[index], self.scaling)
            started.add(index)
        return grad_low_TR, grad_ups

    def _columns(self, low_rank_TR: Tensor) -> Sequence[Tensor]:
        columns: Sequence[Tensor] = low_rank_TR.split([up.shape[1] for up in self.ups], dim=1)
        return columns


def _product_into(out_Or: Tensor, grad_TO: Tensor, low_Tr: Tensor, scaling: float) -> None:
    """`out = scaling * grad.T @ low`."""
    if out_Or.is_cuda:
        out_Or.addmm_(grad_TO.t(), low_Tr, beta=0, alpha=scaling)
    else:
        # Transposed: a CPU's wide products are up to three times as fast as tall ones.
        out_Or.copy_((low_Tr.t() @ grad_TO).mul_(scaling).t())


def add_low_rank(output_T1O: Tensor, low_rank: LowRank) -> Tensor:
    """Add the adapters' part to a linear's output, in place.

    Args:
        output_T1O: contiguous, with any leading shape of T elements; the output of a function that
            does not save it for its own backward pass.
        low_rank: its tensors are saved for the backward pass.

    Returns:
        `output_T1O`, connected in the graph to the low-rank input and the matrices.
    """
    low_rank_TR, ups, scaling, parts = low_rank
    return cast(Tensor, _AddLowRank.apply(output_T1O, low_rank_TR, scaling, parts, *ups))


def dropout_linear(input_TI: Tensor, downs: Sequence[Tensor], dropout: float) -> Tensor:
    """`linear(dropout(input), down)` for each A matrix `[r, I]`, each with its own mask.

    One kernel for all masks and one batched product, which reads all dropped inputs at once. Saves
    the input, and on a CPU the masks, one byte per element; torch's dropout would save its output
    for each. Draws from the current default generator. On a GPU the backward pass draws the masks
    again, from the generator's state, instead of keeping them: seven per layer, each as wide as the
    input.

    Returns:
        `[T, P r]`, the products with the matrices one after another.
    """
    return cast(Tensor, _DroppedLinear.apply(input_TI, dropout, *downs))


def block_diagonal(blocks: Sequence[tuple[slice, Tensor]], groups: int, group_rows: int) -> Tensor:
    """B matrices in one, with zeros elsewhere.

    Args:
        blocks: the rows of a matrix in the first group, and the matrix `[groups rows, r]`, which
            has the columns after those of the matrices before it.
        groups: equal groups of rows, each with rows of every matrix.
        group_rows: rows of a group.

    Returns:
        `[groups group_rows, R]`, R the sum of the ranks.
    """
    rows, ups = zip(*blocks, strict=True)
    return cast(Tensor, _BlockDiagonal.apply(groups, group_rows, rows, *ups))


class _BlockDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, groups: int, group_rows: int, rows: Sequence[slice], *ups: Tensor
    ) -> Tensor:
        ctx.groups, ctx.rows, ctx.ranks = groups, rows, [up.shape[1] for up in ups]
        whole = ups[0].new_zeros(groups, group_rows, sum(ctx.ranks))
        for part, up in zip(_parts_of(whole, ctx), ups, strict=True):
            part.copy_(up.unflatten(0, (groups, -1)))
        return whole.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = _parts_of(grad.unflatten(0, (ctx.groups, -1)), ctx)
        return None, None, None, *(part.flatten(0, 1) for part in parts)


def _parts_of(whole: Tensor, ctx: Any) -> list[Tensor]:
    """Each matrix's part of `[groups, group_rows, R]`."""
    columns = whole.split(ctx.ranks, dim=2)
    return [part[:, rows] for rows, part in zip(ctx.rows, columns, strict=True)]


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
        low_rank = LowRank(low_rank_TR, ups, scaling, parts)
        low_rank.add_to(output_T1O.view(-1, output_T1O.shape[-1]))
        ctx.save_for_backward(low_rank_TR, *ups)
        ctx.scaling, ctx.parts = scaling, parts
        return output_T1O

    @staticmethod
    def backward(ctx: Any, grad_T1O: Tensor) -> tuple[Tensor | None, ...]:
        low_rank_TR, *ups = ctx.saved_tensors
        low_rank = LowRank(low_rank_TR, ups, ctx.scaling, ctx.parts)
        grad_TO = grad_T1O.reshape(-1, grad_T1O.shape[-1])
        grad_low_TR, grad_ups = low_rank.gradients(grad_TO)
        return grad_T1O, grad_low_TR, None, None, *grad_ups


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, dropout: float, *downs: Tensor) -> Tensor:
        ctx.dropout = dropout
        ctx.mask_seed = _MaskSeed.now(input_TI.device) if input_TI.is_cuda else None
        dropped_PTI, mask_PTI = _dropped(input_TI, len(downs), dropout)
        kept = (mask_PTI,) if ctx.mask_seed is None else ()
        down_PrI = downs[0][None] if len(downs) == 1 else torch.stack(downs)
        ctx.save_for_backward(input_TI, down_PrI, *kept)
        low_TPr = input_TI.new_empty(len(input_TI), len(downs), len(downs[0]))
        torch.bmm(dropped_PTI, down_PrI.mT, out=low_TPr.transpose(0, 1))
        return low_TPr.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_TR: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, down_PrI, *kept = ctx.saved_tensors
        # The gradient of dropout is dropout with the same mask and scale. Applied to the input, it
        # also recomputes the dropped input, which is not saved.
        if ctx.mask_seed is None:
            (mask_PTI,) = kept
            scale = 1 / (1 - ctx.dropout)
            dropped_PTI = torch.ops.aten.native_dropout_backward(input_TI[None], mask_PTI, scale)
        else:
            with ctx.mask_seed.drawing_again():
                dropped_PTI, mask_PTI = _dropped(input_TI, len(down_PrI), ctx.dropout)
        grad_PTr = grad_TR.unflatten(1, (len(down_PrI), -1)).transpose(0, 1)
        grad_downs = torch.bmm(grad_PTr.mT, dropped_PTI).unbind()
        del dropped_PTI
        grad_input_TI = None
        if ctx.needs_input_grad[0]:
            grad_input_TI = _dropped_sum(grad_PTr @ down_PrI, mask_PTI, ctx.dropout)
        return grad_input_TI, None, *grad_downs


def _dropped(input_TI: Tensor, copies: int, dropout: float) -> tuple[Tensor, Tensor]:
    """`[P, T, I]` each: the input after dropout, and the masks."""
    repeated_PTI = input_TI.expand(copies, *input_TI.shape)
    dropped_PTI, mask_PTI = torch.native_dropout(repeated_PTI, dropout, train=True)
    return dropped_PTI, mask_PTI


def _dropped_sum(grad_PTI: Tensor, mask_PTI: Tensor, dropout: float) -> Tensor:
    """The input's gradient `[T, I]` from those of the dropped inputs."""
    scale = 1 / (1 - dropout)
    masked_PTI: Tensor = torch.ops.aten.native_dropout_backward(grad_PTI, mask_PTI, scale)
    return masked_PTI[0] if len(masked_PTI) == 1 else masked_PTI.sum(0)


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
