"""Hugging Face checkpoints of every supported family, small enough to test on a laptop.

`tiny_hf_config` is a `config.json` as a dict, with the family's characteristic parts (grouped
queries, Mistral's sliding window, Qwen's biases and q/k norms, experts, tied embeddings on
request) at a hidden size of 64. `write_tiny_hf_model` saves a randomly initialized model of it as
Transformers does, in fp32 safetensors, without a tokenizer.
"""

from pathlib import Path
from typing import Any

_SHARED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 256,
}
"""Heads, groups and layers are divisible by 4, for TP 4 and PP 4."""

_QWEN: dict[str, Any] = {
    "max_window_layers": 4,
    "sliding_window": None,
    "use_sliding_window": False,
}

_GLM: dict[str, Any] = {
    "attention_bias": True,
    "head_dim": 16,
    "pad_token_id": None,
    "partial_rotary_factor": 0.5,
}

_GEMMA: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": None,
    "query_pre_attn_scalar": 24,
}

_BY_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 8,
        "mlp_bias": False,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "head_dim": 8, "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **_QWEN},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        # Not hidden_size / num_attention_heads: the head dimension is independent.
        "head_dim": 16,
        **_QWEN,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "head_dim": 8,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
        # Between the layers with experts, a dense one.
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        **_QWEN,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [],
        "pad_token_id": None,
        "use_sliding_window": False,
    },
    "seed_oss": {
        "architectures": ["SeedOssForCausalLM"],
        "attention_bias": True,
        "head_dim": 16,
        "pad_token_id": None,
        "residual_dropout": 0.0,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "mlp_bias": False,
        "residual_multiplier": 0.4,
    },
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": 16,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 256,
        "pad_token_id": None,
        "resid_pdrop": 0.0,
        "sliding_window": None,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "pad_token_id": None},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "pad_token_id": None,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "sliding_window": 6,
    },
    "glm": {**_GLM, "architectures": ["GlmForCausalLM"]},
    "glm4": {**_GLM, "architectures": ["Glm4ForCausalLM"]},
    "ernie4_5": {
        "architectures": ["Ernie4_5ForCausalLM"],
        "head_dim": 16,
        "pad_token_id": None,
        "use_bias": False,
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "pad_token_id": None,
    },
    "gemma2": {
        **_GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        # Small, so that they bend the scores and logits of a tiny model.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "sliding_window": 6,
    },
    "gemma3_text": {
        **_GEMMA,
        "architectures": ["Gemma3ForCausalLM"],
        "rope_local_base_freq": 100.0,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
    },
}

TINY_FAMILIES = tuple(_BY_FAMILY)
"""The supported families."""


def tiny_hf_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A tiny model's `config.json`.

    Args:
        family: One of `TINY_FAMILIES`.
        **overrides: Fields to change or add, for example `num_key_value_heads=2`,
            `tie_word_embeddings=True`, `sliding_window=16` or
            `rope_scaling={"rope_type": "linear", "factor": 2.0}`. A value replaces the whole field.

    Returns:
        A new dict, as from `json.load`.

    Raises:
        ValueError: The family is unknown.
    """
    if family not in _BY_FAMILY:
        raise ValueError(f"no tiny model of {family!r}; choose one of {', '.join(_BY_FAMILY)}")
    config = {**_SHARED, **_BY_FAMILY[family], "model_type": family, "dtype": "float32"}
    if "no_rope_layers" in config:
        layers = overrides.get("num_hidden_layers", config["num_hidden_layers"])
        config["no_rope_layers"] = [(layer + 1) % 2 for layer in range(layers)]
    return config | overrides


def write_tiny_hf_model(
    directory: str | Path, family: str, seed: int = 0, **overrides: Any
) -> Path:
    """Save a randomly initialized tiny model as Transformers saves it.

    The norms and biases, which Transformers initializes to ones and zeros, are random too, so that
    tests detect a converter that drops or swaps one.

    Args:
        directory: Gets `config.json`, `generation_config.json` and `model.safetensors`; created
            if it does not exist.
        family: One of `TINY_FAMILIES`.
        seed: Of the weights; the process's random generator is not changed.
        **overrides: As for `tiny_hf_config`.

    Returns:
        `directory` as a path.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**tiny_hf_config(family, **overrides))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return Path(directory)
