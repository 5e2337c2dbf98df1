"""RMSNorms that megatron-core builds its layers with, where Transformer Engine does not.

S  positions (a shard of them under sequence parallelism)   B  batch   H  hidden size
N  heads of this tensor-parallel rank   D  head size   Q  features of all heads of the model
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension; supports sequence parallelism.

    Under sequence parallelism each tensor-parallel rank normalizes its own positions with a
    replicated weight, so the weight's gradient is a partial sum. The parameter attribute
    `sequence_parallel` makes megatron-core sum it over the tensor-parallel group
    (`finalize_model_grads._allreduce_non_tensor_model_parallel_grads`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Build with megatron-core's norm signature (`LayerNormBuilder`).

        Args:
            config: gives `params_dtype`, `sequence_parallel` and `layernorm_zero_centered_gamma`:
                the factor is 1 + weight.
            hidden_size: size of the normalized dimension (the head dimension for q and k norms).
            eps: added to the mean square.
        """
        super().__init__()
        self.eps = eps
        self.is_zero_centered = bool(config.layernorm_zero_centered_gamma)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - not a Tensor field

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Normalize `hidden_SBH`, with any leading dimensions; same shape and dtype."""
        shape = (hidden_SBH.shape[-1],)
        if not self.is_zero_centered:
            return torch.nn.functional.rms_norm(hidden_SBH, shape, self.weight, self.eps)
        # 1 + weight in 16 bits would lose most digits of the weight.
        return _norm(hidden_SBH, self.weight, offset=1.0, num_features=shape[0], eps=self.eps)


class _WholeProjectionNorm(torch.nn.Module):
    """RMSNorm over the features of all heads together (OLMo 2), which tensor parallelism splits.

    The weight is whole on every rank, and each rank reads the part of its heads. megatron-core sums
    the gradients of q and k norms over the tensor-parallel group
    (`finalize_model_grads._allreduce_non_tensor_model_parallel_grads`), here of disjoint parts.
    """

    def __init__(self, config: TransformerConfig, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        num_features = num_heads * config.kv_channels
        self.weight = torch.nn.Parameter(
            torch.ones(num_features, dtype=config.params_dtype, device=device)
        )

    def forward(self, heads_SBND: Tensor) -> Tensor:
        """Normalize `[S, B, N, D]`; same shape and dtype.

        Collective over the tensor-parallel group: forward, an all-reduce of the mean squares;
        backward, one of their gradients.
        """
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        weight_ND = self.weight.chunk(size)[rank].view(heads_SBND.shape[-2:])
        group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
        return _norm(
            heads_SBND, weight_ND, num_features=self.weight.numel(), eps=self.eps, group=group
        )


def _norm(
    features: Tensor,
    weight: Tensor,
    *,
    num_features: int,
    eps: float,
    offset: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`features * rstd * (weight + offset)` in fp32, like Transformers; keeps the 16-bit input.

    Args:
        features: normalized over its last dimensions, those of `weight`.
        weight: `[H]` or `[N, D]`.
        num_features: over all ranks of `group`.
        eps: added to the mean square.
        offset: of the weight.
        group: ranks that share the features.
    """
    normed: Tensor = _Norm.apply(features, weight, num_features, eps, offset, group)
    return normed


class _Norm(torch.autograd.Function):
    """Eager operations would keep two fp32 tensors, four times the bytes of a 16-bit input."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        num_features: int,
        eps: float,
        offset: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        values = features.float()
        squares = _sum_features(values * values, weight.dim(), group)
        rstd = torch.rsqrt(squares / num_features + eps)
        ctx.save_for_backward(features, weight, rstd)
        ctx.num_features, ctx.offset, ctx.group = num_features, offset, group
        return (values * rstd * (weight.float() + offset)).type_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, rstd = ctx.saved_tensors
        dims = weight.dim()
        grad, normed = grad.float(), features.float() * rstd
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -dims - 1).sum(0).type_as(weight)
        grad = grad * (weight.float() + ctx.offset)
        # rstd depends on all features, hence on those of the other ranks.
        along = _sum_features(grad * normed, dims, ctx.group) / ctx.num_features
        grad_features = (rstd * (grad - normed * along)).type_as(features)
        return grad_features, grad_weight, None, None, None, None


def _sum_features(values: Tensor, dims: int, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the last `dims` dimensions, which are kept as 1, and over the ranks of `group`."""
    total = values.sum(dim=tuple(range(-dims, 0)), keepdim=True)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


class WholeQueryNorm(_WholeProjectionNorm):
    """The norm of all query heads together, `q_layernorm` of megatron-core's attention."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Build with megatron-core's norm signature; `hidden_size` is that of one head."""
        assert hidden_size == config.kv_channels
        super().__init__(config, config.num_attention_heads, eps)


class WholeKeyNorm(_WholeProjectionNorm):
    """The norm of all key heads together, `k_layernorm` of megatron-core's attention."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Build with megatron-core's norm signature; `hidden_size` is that of one head."""
        assert hidden_size == config.kv_channels
        super().__init__(config, config.num_query_groups, eps)


class ResidualAdd(torch.nn.Module):
    """megatron-core's bias-dropout-add, with a norm of the branch or a factor before the sum.

    residual + factor * norm(branch). It takes the place of `get_bias_dropout_add` in a layer spec.
    """

    def __init__(self, config: TransformerConfig, *, has_norm: bool, factor: float) -> None:
        """Build for one of a layer's two branches.

        Args:
            config: gives the norm's size, epsilon and dtype.
            has_norm: whether the branch is normalized.
            factor: of the (normalized) branch.
        """
        super().__init__()
        self.factor = factor
        self.norm: RMSNorm | None = None
        if has_norm:
            self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Any:
        """A function of `(branch, bias)`, residual and dropout, like `get_bias_dropout_add`."""

        def add(
            branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            branch_SBH, bias_H = branch_and_bias
            if bias_H is not None:
                branch_SBH = branch_SBH + bias_H
            if self.norm is not None:
                branch_SBH = self.norm(branch_SBH)
            if self.factor != 1.0:
                branch_SBH = branch_SBH * self.factor
            branch_SBH = torch.nn.functional.dropout(branch_SBH, dropout, training)
            return residual + branch_SBH

        return add
