"""The product of a frozen 16-bit linear, with its adapters added before the output is rounded.

A bf16 output plus a small contribution rounds back to that output: after the first step 90 % of the
outputs would be those of the frozen linear. Here the sum of both products is rounded once:

* GPUs, and CPUs with bf16 instructions: the low-rank product is written to the output first, and
  the linear's own product is added to it: a GEMM with beta = 1, which adds in its float32
  accumulator. It launches and transfers as much as the other order. The low-rank product alone is
  rounded as well, to 2^-9 of itself.
* Other CPUs, where 16-bit products are 8 (bf16) or 100 (fp16) times slower than fp32 ones: both are
  float32 products (`mcore/matmul.py`), for some positions at a time.

Without adapters and with B = 0 the same kernels run on the same values, so that a policy equals its
reference bitwise before the first step.

    T  positions   I  input features   O  output features   R  low-rank features
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from megatron_idpo.mcore.lora.products import LowRank, Part
from megatron_idpo.mcore.matmul import (
    float32_reductions,
    matmul_operand,
    onednn_bf16_matmul,
    slices,
)

_TILE_TOKENS = 512
"""Positions of a float32 product at a time; its output stays in a CPU's last-level cache."""


def frozen_linear(
    input_T1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None
) -> Tensor:
    """`input @ weight.T + bias`, and the adapters' part, in the dtype of the weight.

    Args:
        input_T1I: with any leading shape of T elements; not saved for the backward pass.
        weight_OI: 16 bits, frozen.
        bias_O: frozen. Where products have 16 bits it is added to the rounded sum, as by
            megatron-core.
        low_rank: saved for the backward pass; None without adapters.
    """
    if torch.is_grad_enabled():
        assert not weight_OI.requires_grad, "a trained weight would get no gradient"
        is_frozen = bias_O is None or not bias_O.requires_grad
        assert is_frozen, "a trained bias would get no gradient"
    low_rank_TR, ups, scaling, parts = low_rank or (None, (), 1.0, ())
    output = _FrozenLinear.apply(input_T1I, weight_OI, bias_O, scaling, parts, low_rank_TR, *ups)
    return cast(Tensor, output)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_T1I: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scaling: float,
        parts: Sequence[Part],
        low_rank_TR: Tensor | None,
        *ups: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, low_rank_TR, *ups)
        ctx.scaling, ctx.parts = scaling, parts
        low_rank = None if low_rank_TR is None else LowRank(low_rank_TR, ups, scaling, parts)
        forward = _forward if multiplies_in_16_bits(weight_OI) else _forward_widened
        input_TI = input_T1I.reshape(-1, input_T1I.shape[-1])
        # Not a view of it: consumers may change an output in place.
        output_T1O = input_T1I.new_empty(*input_T1I.shape[:-1], len(weight_OI))
        forward(output_T1O.view(-1, len(weight_OI)), input_TI, weight_OI, bias_O, low_rank)
        return output_T1O

    @staticmethod
    def backward(ctx: Any, grad_T1O: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, low_rank_TR, *ups = ctx.saved_tensors
        low_rank = None
        if low_rank_TR is not None:
            low_rank = LowRank(low_rank_TR, ups, ctx.scaling, ctx.parts)
        grad_TO = grad_T1O.reshape(-1, grad_T1O.shape[-1])
        is_input_trained = ctx.needs_input_grad[0]
        if multiplies_in_16_bits(weight_OI):
            grad_TI = grad_TO @ weight_OI if is_input_trained else None
            grad_low_TR, grad_ups = low_rank.gradients(grad_TO) if low_rank else (None, [])
        else:
            grad_TI, grad_low_TR, grad_ups = _backward_widened(
                grad_TO, weight_OI, low_rank, is_input_trained=is_input_trained
            )
        grad_T1I = None if grad_TI is None else grad_TI.view(*grad_T1O.shape[:-1], -1)
        return grad_T1I, None, None, None, None, grad_low_TR, *grad_ups


def multiplies_in_16_bits(weight: Tensor) -> bool:
    """Whether the device of a weight multiplies its dtype without widening it."""
    if weight.is_cuda:
        return True
    # `torch.cpu.get_capabilities` is not in every torch that is supported.
    return weight.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _forward(
    output_TO: Tensor,
    input_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    low_rank: LowRank | None,
) -> None:
    if low_rank is None or not _is_complete(low_rank, len(weight_OI)):
        # Also without adapters: a product that is not added to anything might be another kernel.
        output_TO.zero_()
    if low_rank is not None:
        low_rank.add_to(output_TO, beta=0)
    with float32_reductions(weight_OI):
        output_TO.addmm_(input_TI, weight_OI.t())
    if bias_O is not None:
        output_TO.add_(bias_O)


def _is_complete(low_rank: LowRank, num_features: int) -> bool:
    """Whether every output feature has an adapter."""
    adapted = (len(range(*part[0].indices(num_features))) for part in low_rank.parts)
    return sum(adapted) == num_features


def _forward_widened(
    output_TO: Tensor,
    input_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    low_rank: LowRank | None,
) -> None:
    weight = matmul_operand(weight_OI, weight_OI.dtype)
    wide = None if low_rank is None else _widened(low_rank)
    with onednn_bf16_matmul(weight_OI):
        for tokens in slices(len(input_TI), _TILE_TOKENS):
            tile = matmul_operand(input_TI[tokens], weight_OI.dtype) @ weight.t()
            if wide is not None:
                _at(wide, tokens).add_to(tile)
            if bias_O is not None:
                tile.add_(bias_O)
            output_TO[tokens] = tile


def _backward_widened(
    grad_TO: Tensor, weight_OI: Tensor, low_rank: LowRank | None, *, is_input_trained: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of the input, of the low-rank input and of the B's; each is rounded once."""
    dtype = weight_OI.dtype
    grad_TI = grad_TO.new_empty(len(grad_TO), weight_OI.shape[1]) if is_input_trained else None
    weight = matmul_operand(weight_OI, dtype)
    wide = None if low_rank is None else _widened(low_rank)
    grad_low_TR = None if wide is None else torch.empty_like(wide.low_rank_TR)
    grad_ups = [] if wide is None else [torch.zeros_like(up) for up in wide.ups]
    with onednn_bf16_matmul(weight_OI):
        for tokens in slices(len(grad_TO), _TILE_TOKENS):
            tile = matmul_operand(grad_TO[tokens], dtype)
            if grad_TI is not None:
                grad_TI[tokens] = tile @ weight
            if wide is not None and grad_low_TR is not None:
                grad_low_TR[tokens], tile_ups = _at(wide, tokens).gradients(tile)
                for grad_up, tile_up in zip(grad_ups, tile_ups, strict=True):
                    grad_up.add_(tile_up)
    if grad_low_TR is not None:
        grad_low_TR = grad_low_TR.to(dtype)
    return grad_TI, grad_low_TR, [grad_up.to(dtype) for grad_up in grad_ups]


def _widened(low_rank: LowRank) -> LowRank:
    """In float32."""
    low_rank_TR = matmul_operand(low_rank.low_rank_TR, low_rank.low_rank_TR.dtype)
    ups = [matmul_operand(up, up.dtype) for up in low_rank.ups]
    return low_rank._replace(low_rank_TR=low_rank_TR, ups=ups)


def _at(low_rank: LowRank, tokens: slice) -> LowRank:
    """Of some positions."""
    return low_rank._replace(low_rank_TR=low_rank.low_rank_TR[tokens])
