"""Every key of a config.json is read like Transformers reads it, or rejected by name."""

import copy
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.rope.hf_config import rope_problems
from megatron_idpo.testing import tiny_hf_config

REAL: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "hf_configs").glob("*.json"))
}
LLAMA3 = REAL["llama-3.1-8b"]["rope_scaling"]


def _rejection(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        Architecture.from_hf(config)
    return str(error.value)


REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama-2-7b", {"model_type": "gpt2"}, "model_type: 'gpt2'"),
    ("llama-2-7b", {"model_type": ["llama"]}, "model_type"),
    ("llama-2-7b", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama-2-7b", {"architectures": ["LlamaModel"]}, "architectures"),
    ("llama-2-7b", {"attention_bias": True}, "attention_bias: True"),
    ("qwen3-8b", {"attention_bias": True}, "attention_bias: True"),
    ("llama-2-7b", {"mlp_bias": True}, "mlp_bias: True"),
    ("llama-2-7b", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    ("llama-2-7b", {"hidden_size": "4096"}, "hidden_size: '4096'"),
    ("llama-2-7b", {"hidden_size": True}, "hidden_size: True"),
    ("llama-2-7b", {"num_hidden_layers": 0}, "num_hidden_layers: 0"),
    ("llama-2-7b", {"vocab_size": None}, "vocab_size: None"),
    ("llama-2-7b", {"rms_norm_eps": -1.0}, "rms_norm_eps: -1.0"),
    ("llama-2-7b", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
    ("llama-2-7b", {"num_key_value_heads": 5}, "num_key_value_heads: 5"),
    ("llama-2-7b", {"num_attention_heads": 33, "num_key_value_heads": 33}, "attention heads (33)"),
    ("qwen3-8b", {"head_dim": 127}, "127"),
    ("llama-2-7b", {"head_dim": 3}, "head_dim: 3 is not even"),
    ("llama-2-7b", {"tie_word_embeddings": None}, "tie_word_embeddings: None"),
    ("llama-2-7b", {"sliding_window": 4096}, "sliding_window: 4096"),
    ("mistral-7b-instruct-v0.1", {"sliding_window": 0}, "sliding_window: 0"),
    ("mistral-7b-instruct-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ("qwen2.5-7b", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("qwen2.5-7b", {"layer_types": ["linear_attention"] * 28}, "layer_types"),
    ("qwen2.5-7b", {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
    ("qwen2.5-7b", {"use_sliding_window": "yes"}, "use_sliding_window: 'yes'"),
    ("llama-2-7b", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama-2-7b", {"quantization": {"bits": 4, "group_size": 64}}, "quantization"),
    (
        "llama-2-7b",
        {"load_in_4bit": True},
        "load_in_4bit: True says that the weights are quantized",
    ),
    ("llama-2-7b", {"is_encoder_decoder": True}, "is_encoder_decoder: True would change"),
    ("llama-2-7b", {"per_layer_config": {"0": {"head_dim": 2}}}, "per_layer_config"),
    ("llama-2-7b", {"attention_dropout": 1.5}, "attention_dropout: 1.5"),
    ("llama-2-7b", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
    ("llama-2-7b", {"torch_dtype": "float64"}, "torch_dtype: 'float64'"),
    ("llama-2-7b", {"dtype": "bfloat16"}, "dtype: contradictory"),
    ("llama-2-7b", {"rope_theta": "10000"}, "rope_theta: '10000'"),
    ("llama-2-7b", {"rope_scaling": {"type": "mrope"}}, "multimodal"),
    ("llama-2-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ("llama-2-7b", {"rope_scaling": {"type": "su"}}, "rope_scaling.type: 'su'"),
    ("llama-2-7b", {"rope_scaling": {"rope_type": None}}, "rope_scaling.rope_type: None"),
    ("llama-2-7b", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
    ("llama-2-7b", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor: 0"),
    ("llama-2-7b", {"rope_scaling": ["linear"]}, "rope_scaling: ['linear']"),
    (
        "llama-2-7b",
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
        "contradicts",
    ),
    (
        "llama-3.1-8b",
        {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
        "rope_scaling: contradicts rope_parameters",
    ),
    (
        "llama-2-7b",
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta: 500000.0 contradicts rope_parameters.rope_theta = 10000.0",
    ),
    ("llama-3.1-8b", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    ("llama-3.1-8b", {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    (
        "qwen3-8b",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "['full_attention']",
    ),
    (
        "llama-2-7b",
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
        "rope_scaling.low_freq_factor: missing",
    ),
    (
        "llama-2-7b",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_scaling.short_factor: 1 entries for 64 frequencies",
    ),
]


@pytest.mark.parametrize(("name", "change", "reason"), REJECTED)
def test_fields_that_change_the_outputs_are_rejected(
    name: str, change: dict[str, Any], reason: str
) -> None:
    message = _rejection(REAL[name] | change)
    assert "config.json" in message and reason in message


def test_problems_contain_the_given_path() -> None:
    for config, expected in (
        (REAL["llama-2-7b"] | {"hidden_act": "gelu"}, "m/config.json: hidden_act: 'gelu'"),
        (
            {"model_type": "gpt2"},
            "m/config.json: model_type: 'gpt2' .*llama, mistral, qwen2, qwen3",
        ),
        ([], "m/config.json: contains a list"),
    ):
        with pytest.raises(ConfigError, match=f"^{expected}"):
            Architecture.from_hf(config, "m/config.json")


def test_all_problems_are_reported_together() -> None:
    message = _rejection(
        REAL["llama-3.1-8b"]
        | {"mlp_bias": True, "sliding_window": 8, "num_key_value_heads": 7}
        | {"rope_scaling": {"rope_type": "dynamic"}, "torch_dtype": "int8"}
    )
    fields = "mlp_bias sliding_window num_key_value_heads rope_scaling.rope_type torch_dtype"
    assert message.startswith("5 problems:")
    assert all(name in message for name in fields.split())


@pytest.mark.parametrize("config", [None, [], "llama", {}])
def test_an_object_that_is_not_a_config_is_rejected(config: Any) -> None:
    assert "config.json" in _rejection(config)


def test_model_code_that_transformers_has_taken_over_is_accepted() -> None:
    phi, modeling = tiny_hf_config("phi3"), "modeling_phi3.Phi3ForCausalLM"
    own = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": modeling}
    assert Architecture.from_hf(phi | {"auto_map": own}) == Architecture.from_hf(phi)
    for other in ({"AutoModelForCausalLM": "modeling_phi3.MyForCausalLM"}, ["AutoModel"], 3):
        assert "auto_map" in _rejection(phi | {"auto_map": other})


def test_fields_that_affect_only_training_are_accepted() -> None:
    plain = Architecture.from_hf(REAL["llama-2-7b"])
    training = {"attention_dropout": 0.1, "pad_token_id": 0, "auto_map": {"AutoTokenizer": "x.Y"}}
    assert Architecture.from_hf(REAL["llama-2-7b"] | training) == plain


KNOWN = set().union(*REAL.values())
HARMLESS_HERE = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"} | {
    "initializer_range",
    "transformers_version",
    "_name_or_path",
    "pretraining_tp",
    "is_llama_config",
    "attention_dropout",
}
"""Keys without effect here whose values Transformers validates."""
NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200_000) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(REAL)), key=NAMES.map(lambda key: f"x_{key}"), value=JSON)
def test_any_key_that_transformers_never_reads_is_noted(name: str, key: str, value: Any) -> None:
    with_key = Architecture.from_hf(REAL[name] | {key: value})
    assert with_key == Architecture.from_hf(REAL[name]) and with_key.unread_keys == (key,)


UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama-2-7b", {"_model_name_or_path": "x"}, "_model_name_or_path"),
    ("llama-2-7b", {"residual_multiplier": 0.2}, "residual_multiplier"),
    ("llama-2-7b", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("llama-2-7b", {"num_experts": 8}, "num_experts"),
    ("mistral-7b-instruct-v0.1", {"use_sliding_window": False}, "use_sliding_window"),
    ("qwen2.5-7b", {"use_mrope": True}, "use_mrope"),
    ("llama-2-7b", {"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor"),
    ("llama-3.1-8b", {"rope_scaling": LLAMA3 | {"finetuned": True}}, "rope_scaling.finetuned"),
    ("llama-3.1-8b", {"rope_scaling": LLAMA3 | {"x": [[1]]}}, "rope_scaling.x"),
    ("llama-2-7b", {"original_max_position_embeddings": 32}, "original_max_position_embeddings"),
]


@pytest.mark.parametrize(("name", "change", "key"), UNREAD)
def test_key_without_effect_in_transformers_is_noted(
    name: str, change: dict[str, Any], key: str
) -> None:
    architecture = Architecture.from_hf(REAL[name] | change)
    assert architecture.unread_keys == (key,) and key in architecture.unread_note
    assert architecture == Architecture.from_hf(REAL[name])


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(REAL)), key=st.sampled_from(sorted(KNOWN)), value=JSON)
def test_any_value_of_a_known_key_is_read_like_transformers_or_rejected(
    name: str, key: str, value: Any
) -> None:
    config = REAL[name] | {key: value}
    try:
        architecture = Architecture.from_hf(config)
    except ConfigError:
        return
    read = {name: copy.deepcopy(config[name]) for name in config if name not in HARMLESS_HERE}
    hf = CONFIG_MAPPING[config["model_type"]](**read)
    assert (architecture.num_layers, architecture.hidden_size) == (
        hf.num_hidden_layers,
        hf.hidden_size,
    )
    assert (architecture.num_heads, architecture.num_kv_heads) == (
        hf.num_attention_heads,
        hf.num_key_value_heads,
    )
    assert architecture.max_positions == hf.max_position_embeddings
    assert architecture.norm_eps == hf.rms_norm_eps
    assert architecture.rope.as_dict()["rope_theta"] == hf.rope_parameters["rope_theta"]


# --- rope fields ------------------------------------------------------------------------------

ROPE_ACCEPTED: dict[str, dict[str, Any]] = {
    "absent": {},
    "theta": {"rope_theta": 500000.0},
    "null scaling": {"rope_theta": 1e4, "rope_scaling": None},
    "old spelling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "new spelling": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
    "both equal": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
}


@pytest.mark.parametrize("name", ROPE_ACCEPTED)
def test_rope_fields_that_transformers_reads_are_accepted(name: str) -> None:
    config = {"max_position_embeddings": 32768, "head_dim": 64} | ROPE_ACCEPTED[name]
    assert rope_problems(config, location="config.json") == []


def test_all_rope_problems_are_reported_at_their_fields() -> None:
    scaling = {"rope_type": "llama3", "factor": 0}
    problems = rope_problems({"rope_scaling": scaling}, location="here")
    assert {problem.location for problem in problems} == {
        "here: rope_scaling.factor",
        "here: rope_scaling.low_freq_factor",
        "here: rope_scaling.high_freq_factor",
    }
