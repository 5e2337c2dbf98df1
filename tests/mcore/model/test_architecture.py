"""`Architecture.from_hf` reads sizes, defaults and windows like Transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.hf_config import FAMILIES

STORIES = Path(__file__).parents[4] / "shared/models/stories260K/config.json"


# config.json files from the Hub (the yarn one edited as Qwen's README describes).
REAL: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "hf_configs").glob("*.json"))
}

EXPECTED: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"num_kv_heads": 32, "head_dim": 128, "dtype": torch.float16},
    "llama-3.1-8b": {"vocab_size": 128256, "num_kv_heads": 8, "norm_eps": 1e-5},
    "llama-3.2-1b": {"tied_embeddings": True, "head_dim": 64, "num_layers": 16},
    "mistral-7b-instruct-v0.1": {"windows": (4096,) * 32, "ffn_hidden_size": 14336},
    "mistral-7b-instruct-v0.3": {"windows": (None,) * 32, "vocab_size": 32768},
    "mistral-nemo": {"head_dim": 128, "hidden_size": 5120, "num_heads": 32},
    "qwen2.5-7b": {"windows": (None,) * 28, "qkv_bias": True, "qk_norm": False},
    "qwen2.5-7b-yarn": {"max_positions": 32768, "qkv_bias": True},
    "qwen3-8b": {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "norm_eps": 1e-6},
    "solar-10.7b": {"num_layers": 48, "dtype": torch.float16, "tied_embeddings": False},
    "smollm2-135m": {"head_dim": 64, "num_heads": 9, "tied_embeddings": True},
}


@pytest.mark.parametrize("name", REAL)
def test_hub_configs_are_read_without_modification(name: str) -> None:
    before = copy.deepcopy(REAL[name])
    architecture = Architecture.from_hf(REAL[name])
    assert REAL[name] == before, "the input was modified"
    assert {field: getattr(architecture, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert len(architecture.windows) == architecture.num_layers
    hash(architecture)


def test_rope_settings_of_hub_configs() -> None:
    llama = Architecture.from_hf(REAL["llama-3.1-8b"]).rope
    assert llama.as_dict() == REAL["llama-3.1-8b"]["rope_scaling"] | {"rope_theta": 500000.0}
    yarn = Architecture.from_hf(REAL["qwen2.5-7b-yarn"]).rope
    assert (yarn.rope_type, dict(yarn.parameters)["rope_theta"]) == ("yarn", 1000000.0)
    plain = Architecture.from_hf(REAL["smollm2-135m"]).rope
    assert plain.as_dict() == {"rope_type": "default", "rope_theta": 100000}


@pytest.mark.parametrize("name", REAL)
def test_a_config_rewritten_by_transformers_5_reads_the_same(name: str) -> None:
    old = REAL[name]
    new = json.loads(CONFIG_MAPPING[old["model_type"]](**copy.deepcopy(old)).to_json_string())
    assert "rope_parameters" in new and "rope_theta" not in new and "dtype" in new
    assert Architecture.from_hf(new) == Architecture.from_hf(old)


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260K")
def test_stories260k_config() -> None:
    architecture = Architecture.from_hf(json.loads(STORIES.read_text()))
    assert (architecture.family, architecture.num_layers, architecture.head_dim) == ("llama", 5, 8)
    assert architecture.tied_embeddings and architecture.dtype is torch.float32


def _expected_fields(config: dict[str, Any]) -> dict[str, Any]:
    hf = CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config))
    hf.standardize_rope_params()
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": getattr(hf, "moe_intermediate_size", hf.intermediate_size),
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "vocab_size": hf.vocab_size,
        "max_positions": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "tied_embeddings": hf.tie_word_embeddings,
        "rope": {name: value for name, value in hf.rope_parameters.items() if name != "type"},
    }


@pytest.mark.parametrize("name", REAL)
def test_missing_fields_get_transformers_defaults(name: str) -> None:
    for dropped in REAL[name].keys() - {"model_type"}:
        config = {key: value for key, value in REAL[name].items() if key != dropped}
        try:
            architecture = Architecture.from_hf(config)
        except ConfigError as error:
            # The family's default may not fit the other sizes of this model.
            assert dropped in ("num_attention_heads", "num_key_value_heads", "hidden_size")
            assert "num_key_value_heads" in str(error) or "head" in str(error)
            continue
        ours = {
            field: getattr(architecture, field)
            for field in _expected_fields(config)
            if field != "rope"
        }
        expected = _expected_fields(config)
        assert architecture.rope.as_dict() == expected.pop("rope"), dropped
        assert ours == expected, dropped


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_with_only_a_model_type(family: str) -> None:
    architecture = Architecture.from_hf({"model_type": family})
    assert architecture.dtype is torch.float32
    hf = CONFIG_MAPPING[family]()
    window = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    expected = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert architecture.windows == expected


TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Some families' own is beyond this vocabulary.
    "pad_token_id": None,
}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_bias_norm_and_tying_flags_match_transformers_weights(family: str, tied: bool) -> None:
    config = TINY | {"model_type": family, "head_dim": 16, "tie_word_embeddings": tied}
    architecture = Architecture.from_hf(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    layer = "model.layers.0.self_attn."
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    assert shapes[layer + "q_proj.weight"] == (queries, architecture.hidden_size)
    assert shapes[layer + "k_proj.weight"] == (keys, architecture.hidden_size)
    assert (layer + "v_proj.bias" in shapes) == architecture.qkv_bias
    assert (layer + "q_norm.weight" in shapes) == architecture.qk_norm
    assert ("lm_head.weight" in shapes) == (not architecture.tied_embeddings)
    biases = {name for name in shapes if name.endswith("bias")}
    assert all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in biases)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 3}),
        ("mistral", {"sliding_window": None}),
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 2, "layer_types": ["sliding_attention"]},
        ),
    ],
)
def test_windows_match_what_transformers_queries_see(family: str, fields: dict[str, Any]) -> None:
    """Change one token: the output changes for exactly the queries whose window contains it."""
    config = TINY | {"model_type": family, "num_hidden_layers": 1} | fields
    window = Architecture.from_hf(config).windows[0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config)).eval()
    num_tokens, changed_at = 8, 2
    tokens = torch.arange(num_tokens)[None] + 5
    changed = tokens.clone()
    changed[0, changed_at] = 99
    with torch.no_grad():
        same = (model(tokens).logits == model(changed).logits)[0].all(dim=-1)
    distances = [position - changed_at for position in range(num_tokens)]
    visible = [0 <= distance and (window is None or distance < window) for distance in distances]
    assert (~same).tolist() == visible


def test_qwen_windows_depend_on_the_layer() -> None:
    config = REAL["qwen2.5-7b"] | {"use_sliding_window": True, "max_window_layers": 20}
    assert Architecture.from_hf(config).windows == (None,) * 20 + (131072,) * 8
    config["layer_types"] = ["full_attention", "sliding_attention"] * 14
    assert Architecture.from_hf(config).windows == (None, 131072) * 14
