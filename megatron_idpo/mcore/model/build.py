"""Builds megatron-core `GPTModel` chunks from an `Architecture` and a `Layout`, without weights.

`transformer_config` maps the architecture, the layout and the options to megatron-core's
configuration. `build_model` builds this rank's chunks and replaces their rotary embedding. Their
parameters are uninitialized: `convert/hf_to_megatron.py` or `checkpoint/weights.py` fills them all.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_idpo.config.layout import Layout
from megatron_idpo.mcore.lora.chunk import ADAPTERS_NAME
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.head_replica import REPLICA_NAME
from megatron_idpo.mcore.model.layer_variant import LayerVariant
from megatron_idpo.mcore.model.logit_map import LogitMap
from megatron_idpo.mcore.model.scaled_model import ScaledModel
from megatron_idpo.mcore.model.specs import block_spec, has_transformer_engine
from megatron_idpo.mcore.rope.rotary import RowRotary, attention_scale, rotation_factor
from megatron_idpo.mcore.rope.rotation import use_short_rotation

__all__ = [
    "GPTModel",
    "ModelOptions",
    "Recompute",
    "build_model",
    "finalize_model_grads",
    "global_parameters",
    "padded_vocab_size",
    "transformer_config",
]


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which activations are recomputed in the backward pass instead of kept."""

    granularity: Literal["off", "selective", "full"] = "off"
    """`selective` recomputes core attention only, `full` whole layers."""

    method: Literal["uniform", "block"] = "uniform"
    """With `full`: recompute in chunks of `num_layers`, or the first `num_layers` of a stage."""

    num_layers: int = 1
    """With `full`: see `method`."""

    def config_fields(self) -> dict[str, Any]:
        """The corresponding fields of `TransformerConfig`."""
        if self.granularity == "off":
            return {}
        if self.granularity == "selective":
            return {"recompute_granularity": "selective"}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.method,
            "recompute_num_layers": self.num_layers,
        }


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Choices about a model other than its architecture and layout."""

    dtype: torch.dtype = torch.float32
    """Of parameters and activations: float32, bfloat16 or float16."""

    recompute: Recompute = field(default_factory=Recompute)

    transformer_engine: bool = True
    """Build from Transformer Engine's modules where they work. Not for adapters in 16 bits or of
    experts: `lora.adapters.needs_local_layers`."""

    grouped_experts: bool = True
    """Compute a rank's experts together, by Transformer Engine's `TEGroupedMLP` where that is used,
    else by `grouped_experts.py`; False: one after another."""

    router_aux_loss: float = 0.0
    """Coefficient of the experts' load-balancing loss (`experts.py`); 0 is off."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Further `TransformerConfig` fields, applied last."""


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the model's embedding: `vocab_size` rounded up to a multiple of `tensor`.

    No more padding than that: every padded row is a logit that log-probabilities have to mask.
    Checkpoints do not depend on it: the embedding is saved with `allow_shape_mismatch`.
    """
    return -(-vocab_size // tensor) * tensor


def transformer_config(
    architecture: Architecture, layout: Layout, options: ModelOptions
) -> TransformerConfig:
    """megatron-core's configuration for this architecture in this layout."""
    uses_te = options.transformer_engine and has_transformer_engine() and _fits_te(architecture)
    fields = {
        **_shape_fields(architecture),
        **_numeric_fields(architecture, options.dtype),
        **_acceleration_fields(architecture),
        "transformer_impl": "transformer_engine" if uses_te else "local",
        **layout_fields(layout, architecture.num_layers),
        **_expert_fields(architecture, layout, options),
        # Transformer Engine has grouped products; without it, `grouped_experts.py` has.
        "moe_grouped_gemm": uses_te and options.grouped_experts and architecture.num_experts > 0,
        **_recompute_fields(options.recompute, layout),
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
        **options.overrides,
    }
    # Despite its name, this makes megatron-core's MLP use the activation module in the layer's
    # spec, here our SwiGLU. Off where the spec has no such module (experts, Transformer Engine's
    # layers): with the flag set they would apply the activation without the gate.
    has_module = fields.get("num_moe_experts") is None and fields["transformer_impl"] == "local"
    has_module = has_module and architecture.gate == "silu"
    fields["use_te_activation_func"] = has_module and not fields["bias_activation_fusion"]
    config = TransformerConfig(**fields)
    if (factor := rotation_factor(architecture)) != 1.0:
        # megatron-core multiplies cos and sin by YaRN's concentration factor if its config has
        # these fields: 1 + 0.1 * yarn_mscale * log(yarn_rotary_scaling_factor), here `factor`.
        setattr(config, "yarn_rotary_scaling_factor", math.e)  # noqa: B010 - not a field of it
        setattr(config, "yarn_mscale", 10 * (factor - 1))  # noqa: B010
        setattr(config, "yarn_mscale_all_dim", 0.0)  # noqa: B010
    return config


def _fits_te(architecture: Architecture) -> bool:
    """Whether Transformer Engine's layers have the norms and the activation of this model.

    It fuses the norm before a linear into the linear.
    """
    has_plain_norms = architecture.has_pre_norms and not architecture.has_post_norms
    has_plain_norms = has_plain_norms and not architecture.zero_centered_norms
    return has_plain_norms and not architecture.whole_qk_norm and architecture.gate == "silu"


def layout_fields(layout: Layout, num_layers: int) -> dict[str, Any]:
    """The fields of megatron-core's `TransformerConfig` that describe a layout.

    `pipeline_layers` becomes a `PipelineParallelLayerLayout`: a list per virtual stage, with the
    embedding before the first layer and the loss after the last. megatron-core's alternative,
    `num_layers_in_first/last_pipeline_stage`, keeps the middle stages equal.
    """
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        # megatron-core takes any number, also 1, as a request for the interleaved schedule.
        "virtual_pipeline_model_parallel_size": (
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "sequence_parallel": layout.sequence_parallel,
        "batch_p2p_comm": layout.batch_p2p_comm,
    }
    if layout.pipeline_layers is not None and layout.pipeline > 1:
        stages = [["decoder"] * count for count in layout.split(num_layers)]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = stages
    return fields


def build_model(
    architecture: Architecture, layout: Layout, options: ModelOptions | None = None
) -> list[GPTModel]:
    """Build this rank's chunks of the model on its device, with uninitialized parameters.

    Call after `start_layout`. Returns `layout.virtual_pipeline` chunks in virtual-stage order.

    Raises:
        ConfigError: the layout does not fit this architecture.
    """
    layout.check(architecture, torch.distributed.get_world_size())
    options = options or ModelOptions()
    config = transformer_config(architecture, layout, options)
    # Without interleaving the chunk's index is None.
    vp_stages = [None] if layout.virtual_pipeline == 1 else range(layout.virtual_pipeline)
    return [_build_chunk(architecture, layout, config, options, vp_stage) for vp_stage in vp_stages]


def global_parameters(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters, named with indices that count over the whole model, from 0.

    In a chunk's own names each chunk starts at layer 0, and each rank at expert 0. Only parameters
    of the base model: head replicas and LoRA adapters have other naming schemes and are skipped.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.partition(".")[0] not in (REPLICA_NAME, ADAPTERS_NAME):
                yield _global_name(chunk, name), parameter


def global_expert_biases(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """The biases that balance this rank's routers without a loss: buffers, named as parameters."""
    for chunk in chunks:
        for name, buffer in chunk.named_buffers():
            if name.endswith(".expert_bias"):
                yield _global_name(chunk, name), buffer


def _global_name(chunk: GPTModel, name: str) -> str:
    prefix, *rest = name.split(".", 3)
    if prefix != "decoder" or rest[0] != "layers":
        return name
    # `layer_number` counts from 1 over the whole model.
    layer = chunk.decoder.layers[int(rest[1])]
    return f"decoder.layers.{layer.layer_number - 1}.{_global_expert(rest[2], layer.mlp)}"


_EXPERTS = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<name>.*)"),
    # `TEGroupedMLP`
    re.compile(r"mlp\.experts\.(?P<name>linear_fc[12]\.weight)(?P<expert>\d+)"),
)


def _global_expert(name: str, mlp: Any) -> str:
    """A name within a layer; of an expert: under its index in the whole model."""
    matched = next(filter(None, (pattern.fullmatch(name) for pattern in _EXPERTS)), None)
    if matched is None:
        return name
    expert = mlp.local_expert_indices[int(matched["expert"])]
    return f"mlp.experts.local_experts.{expert}.{matched['name']}"


def _build_chunk(
    architecture: Architecture,
    layout: Layout,
    config: TransformerConfig,
    options: ModelOptions,
    vp_stage: int | None,
) -> GPTModel:
    embedding_factor = architecture.embedding_factor
    if architecture.rounds_embedding_factor:
        embedding_factor = torch.tensor(embedding_factor, dtype=options.dtype).item()
    model = ScaledModel(
        logit_map=LogitMap(architecture.logit_factor, architecture.logit_cap),
        embedding_factor=embedding_factor,
        config=config,
        transformer_layer_spec=block_spec(
            config,
            vp_stage=vp_stage,
            grouped_experts=options.grouped_experts,
            variant=LayerVariant.of(architecture),
        ),
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    for module in model.modules():
        if isinstance(module, SharedExpertMLP):
            # megatron-core creates this parameter on the CPU.
            module.gate_weight.data = module.gate_weight.data.to(module.linear_fc1.weight.device)
    # megatron-core's own rotary embedding supports neither packed rows, whose positions restart,
    # nor all of Transformers' frequency scalings.
    model.rotary_pos_emb = RowRotary(architecture)
    use_short_rotation()
    return model


_GATES = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}


def _recompute_fields(recompute: Recompute, layout: Layout) -> dict[str, Any]:
    if layout.context > 1 and recompute.granularity == "selective":
        # Attention of dealt rows recomputes itself; megatron-core would do it a second time.
        return {}
    return recompute.config_fields()


def _shape_fields(architecture: Architecture) -> dict[str, Any]:
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.dense_ffn_hidden_size or architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "rotary_interleaved": architecture.interleaved_rope,
        **_rotation_fields(architecture),
        **_window_fields(architecture.windows),
    }


def _expert_fields(
    architecture: Architecture, layout: Layout, options: ModelOptions
) -> dict[str, Any]:
    """Experts, without dropping a token."""
    if not architecture.num_experts:
        return {}
    fields: dict[str, Any] = {}
    if architecture.dense_layers:
        # With a list, megatron-core does not stack the layers in checkpoints: their keys differ.
        layers = range(architecture.num_layers)
        fields["moe_layer_freq"] = [int(architecture.has_experts(layer)) for layer in layers]
    if architecture.shared_ffn_hidden_size:
        fields["moe_shared_expert_intermediate_size"] = architecture.shared_ffn_hidden_size
        fields["moe_shared_expert_gate"] = True
    return {
        **fields,
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.experts_per_token,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor or layout.tensor,
        # Softmax over the chosen experts' logits equals rescaling the chosen probabilities.
        "moe_router_pre_softmax": not architecture.renormalizes_experts,
        # In 16 bits, ties between experts would be frequent, and the choice arbitrary.
        "moe_router_dtype": "fp32",
        # The loss is that of `experts.py`.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": options.router_aux_loss,
        "moe_token_dispatcher_type": "alltoall",
    }


def _rotation_fields(architecture: Architecture) -> dict[str, Any]:
    """Layers without rotary embedding; 1 skips it."""
    if not (unrotated := architecture.unrotated_layers):
        return {}
    return {"no_rope_freq": [int(layer in unrotated) for layer in range(architecture.num_layers)]}


def _window_fields(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """Sliding windows in megatron-core's fields: one size, and which layers have it."""
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {}
    assert len(sizes) == 1, f"megatron-core has one window size for all layers, not {sizes}"
    return {
        # A window of w tokens is the query itself and the w - 1 before it; megatron-core counts
        # only the latter.
        "window_size": (sizes.pop() - 1, 0),
        "window_attn_skip_freq": [int(window is not None) for window in windows],
    }


def _numeric_fields(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "layernorm_zero_centered_gamma": architecture.zero_centered_norms,
        "activation_func": _GATES[architecture.gate],
        "softmax_scale": attention_scale(architecture),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # Loading fills every parameter; random initialization would only take time.
        "perform_initialization": False,
    }


def _acceleration_fields(architecture: Architecture) -> dict[str, Any]:
    """Fusions: `torch.compile`d ones on a GPU only; none that need apex, which is optional."""
    on_gpu = torch.cuda.is_available()
    return {
        # megatron-core's fused GELU has other coefficients than torch's.
        "bias_activation_fusion": on_gpu and architecture.gate == "silu",
        "bias_dropout_fusion": on_gpu,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "use_cpu_initialization": False,
        "deallocate_pipeline_outputs": True,
        "cross_entropy_loss_fusion": False,
        # No CUDA graphs. megatron-core's default means the same, but it warns about it.
        "cuda_graph_modules": [],
    }
