"""`LayerVariant`: how a family's layers differ from Llama's, and their modules in a layer spec.

megatron-core's layer has a norm before attention and MLP, and adds their outputs to the residual
stream. Where a family has norms elsewhere, factors, caps or two sets of rotary frequencies, the
spec gets other modules for these places; the layer itself stays megatron-core's.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_idpo.mcore.attention.row_attention import RowAttention
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.experts import RowTransformerLayer
from megatron_idpo.mcore.model.norms import ResidualAdd, WholeKeyNorm, WholeQueryNorm
from megatron_idpo.mcore.rope.rotary import attention_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVariant:
    """Fields of `Architecture` that a layer spec depends on and megatron-core's config lacks."""

    has_pre_norms: bool = True
    has_post_norms: bool = False
    whole_qk_norm: bool = False
    residual_factor: float = 1.0
    score_cap: float | None = None
    local_scale: float | None = None
    """Factor on the scores of layers with a window, if they have other rotary frequencies."""

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """That of a model."""
        local = architecture.local_rope
        return cls(
            has_pre_norms=architecture.has_pre_norms,
            has_post_norms=architecture.has_post_norms,
            whole_qk_norm=architecture.whole_qk_norm,
            residual_factor=architecture.residual_factor,
            score_cap=architecture.score_cap,
            local_scale=None if local is None else attention_scale(architecture, local),
        )

    def core_attention(self) -> Any:
        """The builder of a layer's core attention."""
        if self.score_cap is None and self.local_scale is None:
            return RowAttention
        return partial(RowAttention, score_cap=self.score_cap, local_scale=self.local_scale)

    def attention(self, submodules: Any) -> Any:
        """The submodules of an attention with those of this variant."""
        submodules = replace(submodules, core_attention=self.core_attention())
        if self.whole_qk_norm:
            submodules = replace(submodules, q_layernorm=WholeQueryNorm, k_layernorm=WholeKeyNorm)
        return submodules

    def layer_spec(self, config: TransformerConfig, submodules: Any) -> ModuleSpec:
        """The spec of a layer with these submodules, changed where the variant differs."""
        if not self.has_pre_norms:
            submodules = replace(
                submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp
            )
        if self.has_post_norms or self.residual_factor != 1.0:
            add = ModuleSpec(
                module=ResidualAdd,
                params={
                    "config": config,
                    "has_norm": self.has_post_norms,
                    "factor": self.residual_factor,
                },
            )
            submodules = replace(submodules, self_attn_bda=add, mlp_bda=add)
        return ModuleSpec(module=VariantLayer, submodules=submodules)


class VariantLayer(RowTransformerLayer):
    """A layer that picks its rotary angles, and whose norms may be part of the residual sum."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """See megatron-core's `TransformerLayer`."""
        super().__init__(config, *args, **kwargs)
        # megatron-core's default turns gradients on, also in an evaluation: a norm in the sum would
        # keep its inputs until the end of the forward pass.
        self.bias_dropout_add_exec_handler = nullcontext
        self._is_local = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        angles: Tensor | None = kwargs.get("rotary_pos_emb")
        if angles is not None and angles.shape[2] > 1:
            # [T, 1, 2, ...]: those of layers without a window, then those of layers with one.
            kwargs["rotary_pos_emb"] = angles[:, :, int(self._is_local), None]
        return super()._forward_attention(*args, **kwargs)
