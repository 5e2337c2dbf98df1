"""Rotary embedding on a GPU with three kernels each for queries and keys, forward and backward.

megatron-core's own rotation takes ten kernels for each, of which four compute cos and sin of the
same angles in every layer. Not compiled: a call of a compiled function costs the host more than the
two kernels that it saves. Transformer Engine's fused rotation is used where it is configured. On a
CPU nothing changes.

    T  positions   B  batch   N  heads   D  head size   R  rotated features of a head
"""

from typing import Any

import torch
from megatron.core.transformer import attention
from torch import Tensor

_OWN = attention.apply_rotary_pos_emb


def use_short_rotation() -> None:
    """Replace megatron-core's rotation in its attention, for the whole process. Idempotent."""
    attention.apply_rotary_pos_emb = rotate


def rotate(
    heads_TBND: Tensor,
    angles_T11R: Tensor,
    config: Any,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: Any = None,
    mla_rotary_interleaved: bool = False,
) -> Tensor:
    """Rotate queries or keys; the interface of megatron-core's `apply_rotary_pos_emb`.

    Args:
        heads_TBND: queries or keys.
        angles_T11R: in radians, fp32. Their cos and sin are kept with the tensor.
        config: megatron-core's configuration.
        cu_seqlens: of packed sequences, which megatron-core rotates.
        mscale: a factor of cos and sin.
        cp_group: unused for rows.
        mla_rotary_interleaved: megatron-core rotates.
    """
    if (
        not heads_TBND.is_cuda
        or cu_seqlens is not None
        or config.apply_rope_fusion
        or mla_rotary_interleaved
        or config.multi_latent_attention
    ):
        rotated: Tensor = _OWN(
            heads_TBND,
            angles_T11R,
            config=config,
            cu_seqlens=cu_seqlens,
            mscale=mscale,
            cp_group=cp_group,
            mla_rotary_interleaved=mla_rotary_interleaved,
        )
        return rotated
    cos, sin = _cos_and_sin(angles_T11R, heads_TBND.dtype, mscale)
    result: Tensor = _Rotation.apply(heads_TBND, cos, sin, config.rotary_interleaved)
    return result


def _cos_and_sin(angles_T11R: Tensor, dtype: torch.dtype, factor: float) -> tuple[Tensor, Tensor]:
    """Computed once for all layers, which get the same tensor of angles."""
    kept: dict[Any, tuple[Tensor, Tensor]] = angles_T11R.__dict__.setdefault("_cos_and_sin", {})
    if (dtype, factor) not in kept:
        cos, sin = angles_T11R.cos(), angles_T11R.sin()
        kept[dtype, factor] = ((cos * factor).to(dtype), (sin * factor).to(dtype))
    return kept[dtype, factor]


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is rotated back: the angles of a pair of features are equal."""

    @staticmethod
    def forward(
        ctx: Any, heads_TBND: Tensor, cos_T11R: Tensor, sin_T11R: Tensor, is_interleaved: bool
    ) -> Tensor:
        ctx.save_for_backward(cos_T11R, sin_T11R)
        ctx.is_interleaved = is_interleaved
        return _rotated(heads_TBND, cos_T11R, sin_T11R, is_interleaved, 1)

    @staticmethod
    def backward(ctx: Any, grad_TBND: Tensor) -> tuple[Tensor, None, None, None]:
        cos_T11R, sin_T11R = ctx.saved_tensors
        grad = _rotated(grad_TBND, cos_T11R, sin_T11R, ctx.is_interleaved, -1)
        return grad, None, None, None


def _rotated(
    heads_TBND: Tensor, cos_T11R: Tensor, sin_T11R: Tensor, is_interleaved: bool, direction: int
) -> Tensor:
    """Heads rotated by the angles (`direction` 1) or back (-1); features after R as they are."""
    size, width = heads_TBND.shape[-1], cos_T11R.shape[-1]
    result = heads_TBND.new_empty(heads_TBND.shape)
    old, new = heads_TBND[..., :width], result[..., :width]
    # The two features of a pair: neighbours, or one in each half.
    first, second = slice(0, width // 2), slice(width // 2, width)
    if is_interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
    torch.mul(old, cos_T11R, out=new)
    new[..., first].addcmul_(old[..., second], sin_T11R[..., first], value=-direction)
    new[..., second].addcmul_(old[..., first], sin_T11R[..., second], value=direction)
    if width < size:
        result[..., width:].copy_(heads_TBND[..., width:])
    return result
