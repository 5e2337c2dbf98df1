"""Layouts of families whose layers are not Llama's, measured and planned like the others."""

from typing import Any

from .layout_cases import LORA, LayoutCase, llama

_SIZES = (4, 2048, 16, 8, 8192)


def _family(kind: str, **more: Any) -> dict[str, Any]:
    return llama(*_SIZES, model_type=kind, head_dim=128, **more)


_GEMMA = {
    "query_pre_attn_scalar": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA | {
    "sliding_window": 4096,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_GEMMA3 = _GEMMA | {"sliding_window": 4096, "rope_local_base_freq": 10000.0}
_SHARED = {
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 4096,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
}


def family_cases() -> list[LayoutCase]:
    """Norms in other places and dtypes, gelu, an expert for all tokens."""
    models = {
        "gemma": _family("gemma", **_GEMMA),
        "gemma2": _family("gemma2", **_GEMMA2),
        "gemma3": _family("gemma3_text", **_GEMMA3),
        "olmo2": _family("olmo2"),
        "glm4": _family("glm4", partial_rotary_factor=0.5),
        "qwen2_moe": llama(*_SIZES, model_type="qwen2_moe", **_SHARED),
    }
    cases = []
    for name, model in models.items():
        layout = {"tensor": 2, "expert": 2} if name == "qwen2_moe" else {"tensor": 2}
        adapters = LORA | {"dropout": 0.0}
        cases += [
            LayoutCase(f"{name}, adapters", model, 4, layout=layout, lora=adapters),
            LayoutCase(f"{name}, all weights", model, 8, layout={}),
        ]
    return cases
