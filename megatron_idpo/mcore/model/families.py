"""The supported model families: which keys of config.json they read, and what the keys mean.

One `Family` per `model_type`. `docs/families.md` explains how to add one. `convert/families.py` has
the names of a family's tensors; the layers themselves are built from the fields of `Architecture`,
which `Family.layers` derives from Transformers' config object.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

type Accepted = tuple[tuple[Any, ...], str]
"""The values of a key that do not change the outputs, and the reason to reject others."""

type Windows = Literal["none", "all", "layer_types"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes a family from Llama."""

    causal_lm: str
    """The class of its checkpoints."""

    reads: frozenset[str] = frozenset()
    """Keys that Transformers' code of the family reads, in addition to those of every family. Each
    is in `hf_config.FAMILY_SIZES` or `hf_config.FAMILY_CHECKS`."""

    accepts: Mapping[str, Accepted] = field(default_factory=dict)
    """Keys with the only values that are supported here; others are refused with the reason."""

    windows: Windows = "none"
    """Which layers have `sliding_window`: none, all, or those of `layer_types`."""

    rope_by_layer_type: bool = False
    """Whether layers with a window have other rotary frequencies than the others."""

    rope_keys: frozenset[str] = frozenset()
    """Entries of `rope_parameters` that only this family has."""

    is_partly_rotated: bool = False
    """Whether `partial_rotary_factor` may be below 1."""

    layers: Callable[[Any], dict[str, Any]] = lambda hf_config: {}
    """Fields of `Architecture` that are not Llama's, from Transformers' config object."""


_WINDOW = frozenset({"sliding_window"})
_QWEN_WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})
_LAYER_TYPES = frozenset({"layer_types"})
_EXPERTS = frozenset({"num_local_experts", "num_experts", "num_experts_per_tok"})
"""Transformers takes `num_experts` and `num_local_experts` for the same field."""

_SPARSE = frozenset(
    {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
)
_SCALARS = frozenset(
    "embedding_multiplier residual_multiplier attention_multiplier logits_scaling".split()
)


def _sparse(hf_config: Any) -> dict[str, Any]:
    """Transformers 5.24: `Qwen2MoeDecoderLayer` and `Qwen3MoeDecoderLayer`."""
    only, step = hf_config.mlp_only_layers, hf_config.decoder_sparse_step
    layers = range(hf_config.num_hidden_layers)
    dense = tuple(layer for layer in layers if layer in only or (layer + 1) % step)
    return {
        "dense_layers": dense,
        "dense_ffn_hidden_size": hf_config.intermediate_size if dense else 0,
    }


def _qwen2_moe(hf_config: Any) -> dict[str, Any]:
    return _sparse(hf_config) | {
        "qkv_bias": hf_config.qkv_bias,
        "shared_ffn_hidden_size": hf_config.shared_expert_intermediate_size,
    }


def _granite(hf_config: Any) -> dict[str, Any]:
    return {
        "embedding_factor": float(hf_config.embedding_multiplier),
        "residual_factor": float(hf_config.residual_multiplier),
        "score_factor": float(hf_config.attention_multiplier),
        "logit_factor": 1.0 / hf_config.logits_scaling,
    }


def _smollm3(hf_config: Any) -> dict[str, Any]:
    unrotated = (layer for layer, rope in enumerate(hf_config.no_rope_layers) if not rope)
    return {"unrotated_layers": tuple(unrotated)}


def _ministral3(hf_config: Any) -> dict[str, Any]:
    # Queries are scaled by 1 + beta log(1 + floor(position / original)): by 1 up to there.
    rope = hf_config.rope_parameters
    grows = rope.get("llama_4_scaling_beta") is not None
    return {"longest_sequence": rope["original_max_position_embeddings"] if grows else None}


def _olmo(hf_config: Any) -> dict[str, Any]:
    return {"has_pre_norms": False, "has_post_norms": True, "qk_norm": True, "whole_qk_norm": True}


def _glm(hf_config: Any) -> dict[str, Any]:
    return {"qkv_bias": hf_config.attention_bias, "interleaved_rope": True}


def _gemma(hf_config: Any) -> dict[str, Any]:
    return {
        "zero_centered_norms": True,
        "gate": "gelu_tanh",
        "embedding_factor": hf_config.hidden_size**0.5,
        "rounds_embedding_factor": True,
    }


def _gemma2(hf_config: Any) -> dict[str, Any]:
    return _gemma(hf_config) | {
        "has_post_norms": True,
        "score_factor": hf_config.query_pre_attn_scalar**-0.5,
        "score_cap": hf_config.attn_logit_softcapping,
        "logit_cap": hf_config.final_logit_softcapping,
    }


def _gemma3(hf_config: Any) -> dict[str, Any]:
    return _gemma2(hf_config) | {"qk_norm": True, "score_cap": None}


_GEMMA_KEYS = _WINDOW | _LAYER_TYPES | {"query_pre_attn_scalar"}
_TANH_GELU: Accepted = (("gelu_pytorch_tanh",), "only the GELU-gated MLP is supported")
_GEMMA_ACCEPTS: dict[str, Accepted] = {
    "hidden_activation": _TANH_GELU,
    "hidden_act": _TANH_GELU,
    "use_bidirectional_attention": ((False, None), "only causal attention is supported"),
}

FAMILIES: dict[str, Family] = {
    "llama": Family(causal_lm="LlamaForCausalLM"),
    "mistral": Family(causal_lm="MistralForCausalLM", reads=_WINDOW, windows="all"),
    "qwen2": Family(
        causal_lm="Qwen2ForCausalLM",
        reads=_QWEN_WINDOWS | _LAYER_TYPES,
        windows="layer_types",
        layers=lambda hf_config: {"qkv_bias": True},
    ),
    "qwen3": Family(
        causal_lm="Qwen3ForCausalLM",
        reads=_QWEN_WINDOWS | _LAYER_TYPES,
        windows="layer_types",
        layers=lambda hf_config: {"qk_norm": True},
    ),
    "mixtral": Family(causal_lm="MixtralForCausalLM", reads=_WINDOW | _EXPERTS, windows="all"),
    "qwen2_moe": Family(
        causal_lm="Qwen2MoeForCausalLM",
        reads=_QWEN_WINDOWS
        | _LAYER_TYPES
        | _SPARSE
        | {"num_experts", "num_experts_per_tok", "shared_expert_intermediate_size", "qkv_bias"},
        windows="layer_types",
        layers=_qwen2_moe,
    ),
    "qwen3_moe": Family(
        causal_lm="Qwen3MoeForCausalLM",
        reads=_EXPERTS | _SPARSE | {"sliding_window", "use_sliding_window"},
        windows="all",
        layers=lambda hf_config: {"qk_norm": True, **_sparse(hf_config)},
    ),
    "ministral3": Family(
        causal_lm="Ministral3ForCausalLM",
        reads=_WINDOW,
        windows="all",
        rope_keys=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}),
        layers=_ministral3,
    ),
    "smollm3": Family(
        causal_lm="SmolLM3ForCausalLM",
        reads=_LAYER_TYPES
        | {"sliding_window", "use_sliding_window", "no_rope_layers", "no_rope_layer_interval"},
        windows="layer_types",
        layers=_smollm3,
    ),
    "seed_oss": Family(
        causal_lm="SeedOssForCausalLM",
        reads=frozenset({"attention_bias", "residual_dropout"}),
        accepts={
            "attention_out_bias": (
                (False,),
                "a bias on the attention's output projection is not supported",
            )
        },
        layers=lambda hf_config: {"qkv_bias": hf_config.attention_bias},
    ),
    "granite": Family(causal_lm="GraniteForCausalLM", reads=_SCALARS, layers=_granite),
    "phi3": Family(
        causal_lm="Phi3ForCausalLM",
        reads=_WINDOW | {"resid_pdrop", "embd_pdrop"},
        windows="all",
        is_partly_rotated=True,
    ),
    "olmo2": Family(causal_lm="Olmo2ForCausalLM", layers=_olmo),
    "olmo3": Family(
        causal_lm="Olmo3ForCausalLM",
        reads=_WINDOW | _LAYER_TYPES,
        windows="layer_types",
        rope_by_layer_type=True,
        layers=_olmo,
    ),
    "glm": Family(
        causal_lm="GlmForCausalLM",
        reads=frozenset({"attention_bias"}),
        is_partly_rotated=True,
        layers=_glm,
    ),
    "glm4": Family(
        causal_lm="Glm4ForCausalLM",
        reads=frozenset({"attention_bias"}),
        is_partly_rotated=True,
        layers=lambda hf_config: _glm(hf_config) | {"has_post_norms": True},
    ),
    "ernie4_5": Family(
        causal_lm="Ernie4_5ForCausalLM",
        accepts={"use_bias": ((False, None), "biases are not supported")},
        layers=lambda hf_config: {"interleaved_rope": True},
    ),
    "gemma": Family(
        causal_lm="GemmaForCausalLM",
        accepts={
            # "gelu" stands for the approximation, too, in the published files of this family.
            "hidden_act": (("gelu_pytorch_tanh", "gelu"), _TANH_GELU[1]),
            "use_bidirectional_attention": _GEMMA_ACCEPTS["use_bidirectional_attention"],
        },
        layers=_gemma,
    ),
    "gemma2": Family(
        causal_lm="Gemma2ForCausalLM",
        reads=_GEMMA_KEYS | {"attn_logit_softcapping", "final_logit_softcapping"},
        accepts=_GEMMA_ACCEPTS,
        windows="layer_types",
        layers=_gemma2,
    ),
    "gemma3_text": Family(
        causal_lm="Gemma3ForCausalLM",
        reads=_GEMMA_KEYS
        | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"}
        | {"final_logit_softcapping"},
        accepts=_GEMMA_ACCEPTS
        | {"attn_logit_softcapping": ((None,), "Transformers' Gemma 3 does not apply it")},
        windows="layer_types",
        rope_by_layer_type=True,
        layers=_gemma3,
    ),
}
"""By `model_type`."""

MISSING: dict[str, str] = {
    "gpt_oss": "attention sinks, biases of the attention's output and of experts, clamped SwiGLU "
    "and MXFP4 weights are not implemented",
    "deepseek_v2": "multi-head latent attention (values narrower than keys) and shared experts "
    "without a gate are not implemented",
    "deepseek_v3": "multi-head latent attention (values narrower than keys), shared experts "
    "without a gate and a sigmoid router with groups are not implemented",
    "glm4_moe": "shared experts without a gate and a sigmoid router with groups are not "
    "implemented",
    "falcon": "attention and MLP in parallel, and LayerNorm, are not implemented",
    "llama4_text": "chunked attention and a router that scales the inputs of experts are not "
    "implemented",
    "llama4": "images and chunked attention are not implemented",
    "qwen3_5_text": "linear attention is not implemented",
    "gemma3": "images are not implemented; extract the text model, whose model_type is gemma3_text",
    "mistral3": "images are not implemented; extract the text model, a mistral or ministral3",
}
"""`model_type` -> what a family needs that is not implemented."""
