"""Layer specs: the modules of a transformer layer, from Transformer Engine where it works.

Both specs use our core attention (`RowAttention`), because neither megatron-core's nor Transformer
Engine's supports shared-prompt rows. The local spec also replaces the norm and the activation:
without Transformer Engine, megatron-core's own norm rejects sequence parallelism (`RMSNorm` does
not), and its unfused activation keeps more for the backward pass than `SwiGLU`.

Parameter names differ: `input_layernorm.weight` is `self_attention.linear_qkv.layer_norm_weight` in
Transformer Engine's. megatron-core maps the local names onto those in checkpoints, and
`convert/families.py` knows both.

    S  sequence positions (a shard of them under sequence parallelism)   B  batch   H  hidden size
    T  positions, all leading dimensions flattened   F  MLP features on this rank; the fused input
    12F has the F features of the gate, then the F of the up projection
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_idpo.mcore.model.experts import RowMoELayer, RowRouter
from megatron_idpo.mcore.model.grouped_experts import GroupedExperts
from megatron_idpo.mcore.model.layer_variant import LayerVariant
from megatron_idpo.mcore.model.norms import RMSNorm

_SWIGLU_BLOCK_ELEMENTS = 1 << 17
"""Elements of one half of the input per backward block: 512 KiB in fp32, about a core's cache."""


class SwiGLU(torch.nn.Module):
    """`silu(gate) * up`; keeps only its input for the backward pass. Used on a CPU.

    megatron-core's unfused form also keeps the gate's SiLU and a copy of the up half; its fused
    form is compiled, which is for GPUs.
    """

    def __init__(self, config: Any) -> None:
        """Build with the signature of megatron-core's activation modules.

        Args:
            config: megatron-core's configuration; only checked.
        """
        super().__init__()
        assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        assert not config.glu_linear_offset and config.activation_func_clamp_value is None

    def forward(self, fused_t12F: Tensor) -> Tensor:
        """From `[..., 2F]` to `[..., F]`, in the same dtype."""
        return cast(Tensor, _SwiGLUFunction.apply(fused_t12F))


class _SwiGLUFunction(torch.autograd.Function):
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
        # A few rows at a time, so that the temporaries silu(gate) and grad * up stay in the cache.
        rows = max(1, _SWIGLU_BLOCK_ELEMENTS // size)
        blocks = zip(
            grad_fused_t12F.view(-1, 2 * size).split(rows),
            fused_t12F.reshape(-1, 2 * size).split(rows),
            grad_t1F.reshape(-1, size).split(rows),
            strict=True,
        )
        for grad_fused, fused, grad in blocks:
            gate, up = fused.chunk(2, dim=-1)
            grad_gate, grad_up = grad_fused.chunk(2, dim=-1)
            # Written into the two halves of the result: no torch.cat, hence no second copy.
            torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_fused_t12F


_LLAMA = LayerVariant()


def block_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None,
    grouped_experts: bool = False,
    variant: LayerVariant = _LLAMA,
) -> TransformerBlockSubmodules:
    """The submodules of this rank's transformer block, one layer spec per layer it owns.

    Args:
        config: the model's megatron-core configuration; `transformer_impl` selects the modules.
        vp_stage: the model chunk on this rank, None without interleaving.
        grouped_experts: compute experts together; with Transformer Engine, `moe_grouped_gemm` does.
        variant: how the family's layers differ from Llama's.
    """
    uses_te = _uses_transformer_engine(config)

    def layer(num_experts: int | None) -> ModuleSpec:
        if uses_te:
            return _te_layer(config, variant, num_experts)
        return _local_layer(config, variant, num_experts, grouped=grouped_experts)

    experts = layer(config.num_moe_experts)
    kinds = [layer(None) if 0 in _layers_with_experts(config) else experts, experts]
    first = get_transformer_layer_offset(config, vp_stage)
    own = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[kinds[_layers_with_experts(config)[index]] for index in own],
        layer_norm=LayerNormImpl if uses_te else RMSNorm,
    )


def _layers_with_experts(config: TransformerConfig) -> list[int]:
    """1 for each layer of the model with experts, 0 for others."""
    pattern = config.moe_layer_freq
    return pattern if isinstance(pattern, list) else [1] * config.num_layers


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it is importable, and there is a GPU.

    Its modules need CUDA even to be constructed, so on a CPU it is not used even if installed.
    """
    return bool(HAVE_TE) and torch.cuda.is_available()


def _uses_transformer_engine(config: TransformerConfig) -> bool:
    return has_transformer_engine() and config.transformer_impl == "transformer_engine"


def _te_layer(
    config: TransformerConfig, variant: LayerVariant, num_experts: int | None
) -> ModuleSpec:
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if num_experts is not None and _has_row_experts(config):
        submodules = _with_row_experts(submodules)
    attention = variant.attention(submodules.self_attention.submodules)
    return variant.layer_spec(config, _with_attention(submodules, attention))


def _local_layer(
    config: TransformerConfig, variant: LayerVariant, num_experts: int | None, *, grouped: bool
) -> ModuleSpec:
    submodules = get_gpt_layer_local_submodules(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    attention = submodules.self_attention.submodules
    if config.qk_layernorm:
        attention = replace(attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    attention = variant.attention(attention)
    submodules = replace(submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    if num_experts is None:
        # Only used if `use_te_activation_func` is set, see `build.transformer_config`.
        mlp = submodules.mlp
        mlp_submodules = replace(mlp.keywords["submodules"], activation_func=SwiGLU)
        submodules = replace(submodules, mlp=partial(mlp.func, submodules=mlp_submodules))
    else:
        # As in Transformer Engine's layers, which do not fuse this norm with experts.
        keys = dict(submodules.sharded_state_dict_keys_map)
        del keys["pre_mlp_layernorm."]
        submodules = replace(submodules, sharded_state_dict_keys_map=keys)
        if _has_row_experts(config):
            submodules = _with_row_experts(submodules, grouped=grouped)
    return variant.layer_spec(config, _with_attention(submodules, attention))


def _has_row_experts(config: TransformerConfig) -> bool:
    """Not with a balancing of megatron-core's, which `ModelOptions.overrides` may switch on."""
    return bool(config.moe_router_load_balancing_type == "none")


def _with_row_experts(submodules: Any, *, grouped: bool = False) -> Any:
    """The experts that the spec builds, behind our router and without padding."""
    layer = replace(submodules.mlp.keywords["submodules"], router=RowRouter)
    if grouped:
        layer = replace(layer, experts=partial(GroupedExperts, **layer.experts.keywords))
    return replace(submodules, mlp=partial(RowMoELayer, submodules=layer))


def _with_attention(submodules: Any, attention: Any) -> Any:
    """A layer's submodules with `attention` as the submodules of its self-attention."""
    # Nested specs are replaced, never edited in place: megatron-core returns shared instances.
    self_attention = replace(submodules.self_attention, submodules=attention)
    return replace(submodules, self_attention=self_attention)
