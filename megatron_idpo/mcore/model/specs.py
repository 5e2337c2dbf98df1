"""Which modules a transformer layer is made of: Transformer Engine's where it works, else ours.

Both specs share our core attention (`RowAttention`), because neither megatron-core's nor
Transformer Engine's honours a row's shared prompts. Without Transformer Engine, megatron-core's own
norm refuses sequence parallelism, so the local spec brings `RMSNorm`, which does not.

Parameter names differ: `input_layernorm.weight` is `self_attention.linear_qkv.layer_norm_weight` in
Transformer Engine's. megatron-core maps the local names onto those in checkpoints, and
`convert/families.py` knows both.

    S  sequence positions (a shard of them under sequence parallelism)   B  batch   H  hidden size
"""

from dataclasses import replace
from functools import partial
from typing import Any

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
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_idpo.mcore.attention.core import RowAttention
from megatron_idpo.mcore.model.swiglu import SwiGLU


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, sequence parallel where the model is.

    Under sequence parallelism each tensor-parallel rank normalises its own positions with a
    replicated weight, so the weight's gradient is a partial sum. The parameter attribute
    `sequence_parallel` asks megatron-core to add the parts up over the tensor-parallel group
    (`finalize_model_grads._allreduce_non_tensor_model_parallel_grads`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Build with megatron-core's norm signature (`LayerNormBuilder`).

        Args:
            config: gives `params_dtype` and `sequence_parallel`.
            hidden_size: size of the normalised dimension (the head dimension for q and k norms).
            eps: added to the mean square.
        """
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - not a Tensor field

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Normalise `hidden_SBH` of any leading shape; returns the same shape and dtype."""
        return torch.nn.functional.rms_norm(
            hidden_SBH, (hidden_SBH.shape[-1],), self.weight, self.eps
        )


def block_spec(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The submodules of this rank's transformer block, one layer spec per layer it owns.

    Args:
        config: the model's megatron-core configuration; `transformer_impl` says which modules.
        vp_stage: the model chunk on this rank, None without interleaving.
    """
    engine = _uses_transformer_engine(config)
    layer = _engine_layer(config) if engine else _local_layer(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage),
        layer_norm=LayerNormImpl if engine else RMSNorm,
    )


def final_norm(config: TransformerConfig) -> torch.nn.Module:
    """The norm before the output layer, of the kind that `block_spec` gives a last stage."""
    builder = LayerNormImpl if _uses_transformer_engine(config) else RMSNorm
    norm: torch.nn.Module = builder(
        config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return norm


def has_transformer_engine() -> bool:
    """Whether models can be built from Transformer Engine: importable, and with a GPU to run on.

    Its modules need CUDA even to be constructed, so on a CPU it is left aside even where installed.
    """
    return bool(HAVE_TE) and torch.cuda.is_available()


def _uses_transformer_engine(config: TransformerConfig) -> bool:
    return has_transformer_engine() and config.transformer_impl == "transformer_engine"


def _engine_layer(config: TransformerConfig) -> ModuleSpec:
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    attention = replace(submodules.self_attention.submodules, core_attention=RowAttention)
    return _layer(submodules, attention)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    submodules = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    attention = replace(submodules.self_attention.submodules, core_attention=RowAttention)
    if config.qk_layernorm:
        attention = replace(attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    submodules = replace(submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    if config.num_moe_experts is None:
        submodules = replace(submodules, mlp=_with_swiglu(submodules.mlp))
    return _layer(submodules, attention)


def _with_swiglu(mlp: Any) -> Any:
    """A dense MLP's builder with our activation, which `use_te_activation_func` switches on."""
    mlps = mlp.keywords["submodules"]
    return partial(mlp.func, submodules=replace(mlps, activation_func=SwiGLU))


def _layer(submodules: Any, attention: Any) -> ModuleSpec:
    """A layer spec with `attention` as the submodules of its self-attention.

    Nested specs are replaced, never edited: megatron-core hands out shared instances.
    """
    self_attention = replace(submodules.self_attention, submodules=attention)
    return ModuleSpec(
        module=TransformerLayer, submodules=replace(submodules, self_attention=self_attention)
    )
