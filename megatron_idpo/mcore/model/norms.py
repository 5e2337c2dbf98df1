"""RMSNorms that megatron-core builds its layers with, where Transformer Engine does not.

S  positions (a shard of them under sequence parallelism)   B  batch   H  hidden size
N  heads of this tensor-parallel rank   D  head size   Q  features of all heads of the model
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
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
        # In fp32, like Transformers: 1 + weight in 16 bits would lose most digits of the weight.
        normed = torch.nn.functional.rms_norm(hidden_SBH.float(), shape, None, self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(hidden_SBH)


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
        heads = heads_SBND.float()
        squares_SB11: Tensor = heads.square().sum(dim=(-2, -1), keepdim=True)
        # The two regions together: an all-reduce forward, and one backward, since every rank's
        # output depends on the sum.
        squares_SB11 = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares_SB11)
        )
        num_features = self.weight.numel()
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        weight_ND = self.weight.chunk(size)[rank].view(heads.shape[-2:])
        normed = heads * torch.rsqrt(squares_SB11 / num_features + self.eps)
        scaled: Tensor = weight_ND.float() * normed
        return scaled.type_as(heads_SBND)


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
