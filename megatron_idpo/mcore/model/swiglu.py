"""SwiGLU that keeps its input and nothing else for the backward pass, on a CPU.

megatron-core's unfused form keeps the gate's SiLU and a copy of the other half as well, twice the
size of the result each; its fused form is compiled, which is for GPUs. Gradients are computed some
rows at a time, so that what comes in between stays in the cache.

    T  positions   F  features of the MLP on this rank; the input has the gate's F, then the other F
"""

from typing import Any, cast

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 17
"""Of a half of the input: 512 KiB in fp32, about a core's cache."""


class SwiGLU(torch.nn.Module):
    """`silu(gate) * up`, as megatron-core's MLP calls an activation of its own."""

    def __init__(self, config: Any) -> None:
        """Take megatron-core's configuration, as it hands it to every activation module."""
        super().__init__()
        assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        assert not config.glu_linear_offset and config.activation_func_clamp_value is None

    def forward(self, fused_t12F: Tensor) -> Tensor:
        """From `[..., 2F]` to `[..., F]`, in the same dtype."""
        return cast(Tensor, _SwiGLU.apply(fused_t12F))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused_t12F: Tensor) -> Tensor:
        ctx.save_for_backward(fused_t12F)
        gate_t1F, up_t1F = fused_t12F.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate_t1F).mul_(up_t1F)

    @staticmethod
    def backward(ctx: Any, grad_t1F: Tensor) -> Tensor:
        (fused_t12F,) = ctx.saved_tensors
        grad_fused_t12F = torch.empty_like(fused_t12F)
        size = fused_t12F.shape[-1] // 2
        rows = max(1, _BLOCK_ELEMENTS // size)
        blocks = zip(
            grad_fused_t12F.view(-1, 2 * size).split(rows),
            fused_t12F.reshape(-1, 2 * size).split(rows),
            grad_t1F.reshape(-1, size).split(rows),
            strict=True,
        )
        for into, fused, grad in blocks:
            gate, up = fused.chunk(2, dim=-1)
            into_gate, into_up = into.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), grad, out=into_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=into_gate)
        return grad_fused_t12F
