"""Gradient norm and scaling of many tensors at once, where neither Transformer Engine nor apex is.

megatron-core's own fallbacks take the norm of each tensor and read it on the host (one wait for the
GPU per trained parameter), and scale with two kernels per tensor. torch's foreach operators do the
same arithmetic with a few kernels and no wait.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from torch import Tensor

_LOCAL_NORM = utils.local_multi_tensor_l2_norm
_LOCAL_SCALE = utils.local_multi_tensor_scale


def use_foreach_operators() -> None:
    """Replace megatron-core's fallbacks; changes nothing where it uses fused kernels. Idempotent.

    For the whole process.
    """
    if clip_grads.l2_norm_impl is _LOCAL_NORM:
        clip_grads.l2_norm_impl = l2_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is _LOCAL_SCALE:
            module.multi_tensor_scale_impl = scale


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *_: Any
) -> tuple[Tensor, None]:
    """The norm of all tensors together, with the interface of `amp_C.multi_tensor_l2norm`.

    Args:
        chunk_size: unused.
        overflow: unused; NaN and inf are in the result.
        tensor_lists: one list, not empty.

    Returns:
        `[1]`, float32 on the tensors' device; and no norms per tensor.
    """
    (tensors,) = tensor_lists
    # The norms of 16-bit tensors would be rounded to 16 bits.
    norms = [norm.float() for norm in torch._foreach_norm(list(tensors))]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale(
    chunk_size: int, overflow: Tensor, tensor_lists: Sequence[Sequence[Tensor]], factor: float
) -> None:
    """`target = source * factor`, with the interface of `amp_C.multi_tensor_scale`.

    Args:
        chunk_size: unused.
        overflow: unused.
        tensor_lists: sources and targets, which may be the same tensors.
        factor: 1 copies.
    """
    sources, targets = (list(tensors) for tensors in tensor_lists)
    if not sources:
        return
    if all(a is b for a, b in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    elif factor == 1.0:
        torch._foreach_copy_(targets, sources)
    else:
        torch._foreach_copy_(targets, torch._foreach_mul(sources, factor))
