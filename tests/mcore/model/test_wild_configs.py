"""config.json files as they are published: none is refused for a key that changes nothing.

`hf_configs/` are files from the hub, `wild_configs.json` has files with the source of each, and
Transformers' own config classes add every key that they write.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.hf_config import FAMILIES
from megatron_idpo.testing import tiny_hf_config

HERE = Path(__file__).parents[1]
SOURCES: dict[str, dict[str, Any]] = json.loads((HERE / "wild_configs.json").read_text())
WILD = {
    **{path.stem: json.loads(path.read_text()) for path in sorted((HERE / "hf_configs").iterdir())},
    **{
        name: entry["config"]
        for name, entry in SOURCES.items()
        if entry["config"]["model_type"] in FAMILIES
    },
    **{f"{name} config class": CONFIG_MAPPING[name]().to_dict() for name in FAMILIES},
}
UNREAD_WORDS = {"internal_version", "move_model_to_device", "sequence_parallel_enabled"} | {
    "selective_checkpoint_enabled",
    "tf_legacy_loss",
    "moe_frequency",
    "use_flash_attention",
    "pretraining_tp",
    # Phi-3's config class writes it, and reads it with LongRoPE only.
    "original_max_position_embeddings",
}
"""Keys of these files that no version of Transformers' models reads today."""


READ_BY_SOME = {"pretraining_tp", "original_max_position_embeddings"}


def test_there_are_thirty_files_and_each_names_its_source() -> None:
    assert len(WILD) >= 30
    assert all(entry["source"].startswith("https://") for entry in SOURCES.values())


@pytest.mark.parametrize("name", WILD)
def test_published_config_is_accepted(name: str) -> None:
    architecture = Architecture.from_hf(WILD[name])
    assert set(architecture.unread_keys) <= UNREAD_WORDS
    hf = CONFIG_MAPPING[WILD[name]["model_type"]](**copy.deepcopy(WILD[name]))
    assert (architecture.num_layers, architecture.vocab_size) == (
        hf.num_hidden_layers,
        hf.vocab_size,
    )


WRONG: list[tuple[str, Any]] = [
    ("hidden_act", "relu"),
    ("vocab_size", 0),
    ("hidden_size", "64"),
    ("num_hidden_layers", 1.5),
    ("num_attention_heads", -1),
    ("num_key_value_heads", 3),
    ("intermediate_size", True),
    ("max_position_embeddings", None),
    ("rms_norm_eps", 0),
    ("tie_word_embeddings", "no"),
    ("rope_theta", "x"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
    ("dtype", "float8_e4m3fn"),
    ("quantization_config", {"quant_method": "fp8"}),
    ("architectures", ["LlamaForSequenceClassification"]),
    ("per_layer_config", {"0": {"head_dim": 2}}),
    ("model_type", "gpt2"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_value_of_a_key_that_changes_numbers_is_refused(
    family: str, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as error:
        Architecture.from_hf(tiny_hf_config(family) | {key: value})
    assert key in str(error.value)


WRONG_EXPERTS: list[tuple[str, str, Any]] = [
    ("mixtral", "num_local_experts", 0),
    ("mixtral", "num_experts_per_tok", 5),
    ("mixtral", "num_experts_per_tok", 1),
    ("mixtral", "router_jitter_noise", 0.1),
    ("qwen3_moe", "num_experts", "8"),
    ("qwen3_moe", "num_experts_per_tok", 0),
    ("qwen3_moe", "moe_intermediate_size", None),
    ("qwen3_moe", "norm_topk_prob", "yes"),
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("qwen3_moe", "decoder_sparse_step", 5),
    ("qwen3_moe", "mlp_only_layers", ["0"]),
    ("qwen3_moe", "mlp_only_layers", [0, 1, 2, 3]),
    ("qwen2_moe", "shared_expert_intermediate_size", 0),
    ("qwen2_moe", "qkv_bias", "no"),
    ("qwen2_moe", "num_experts", None),
]


@pytest.mark.parametrize(("family", "key", "value"), WRONG_EXPERTS)
def test_wrong_value_of_a_key_of_experts_is_refused(family: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Architecture.from_hf(tiny_hf_config(family) | {key: value})
    assert key in str(error.value)


def test_experts_are_read_like_transformers() -> None:
    mixtral = Architecture.from_hf(tiny_hf_config("mixtral"))
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.ffn_hidden_size) == (4, 2, 64)
    assert mixtral.renormalizes_experts
    qwen = tiny_hf_config("qwen3_moe", norm_topk_prob=False)
    # Transformers 5 writes the number of experts under Mixtral's name.
    qwen["num_local_experts"] = qwen.pop("num_experts")
    architecture = Architecture.from_hf(qwen)
    assert (architecture.num_experts, architecture.ffn_hidden_size) == (8, 32)
    assert not architecture.renormalizes_experts


def test_layers_without_experts_are_those_of_transformers() -> None:
    for family, fields in (
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3, 9]}),
        ("qwen2_moe", {"mlp_only_layers": None, "decoder_sparse_step": 3, "qkv_bias": False}),
        ("qwen2_moe", {}),
    ):
        config = tiny_hf_config(family, **fields)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config))
        is_dense = [not hasattr(layer.mlp, "experts") for layer in model.model.layers]
        architecture = Architecture.from_hf(config)
        layers = range(architecture.num_layers)
        assert [not architecture.has_experts(layer) for layer in layers] == is_dense
        assert architecture.dense_ffn_hidden_size == 128
        assert architecture.shared_ffn_hidden_size == config.get(
            "shared_expert_intermediate_size", 0
        )
        bias = model.model.layers[0].self_attn.q_proj.bias
        assert architecture.qkv_bias == (bias is not None)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if number < 7 else [pytest.mark.exhaustive])
        for number, family in enumerate(FAMILIES)
    ],
)
def test_transformers_never_reads_a_noted_key(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second reading: Transformers' model runs with keys that report every access."""
    extra = dict.fromkeys(sorted(UNREAD_WORDS - READ_BY_SOME), math.nan)
    # A setting of another family.
    other = "no_rope_layer_interval" if family == "granite" else "residual_multiplier"
    config = tiny_hf_config(family, num_hidden_layers=2) | extra | {other: 0.5}
    noted = set(Architecture.from_hf(config).unread_keys)
    assert {other, "internal_version"} <= noted
    accessed: set[str] = set()
    config_class = CONFIG_MAPPING[family]
    original = config_class.__getattribute__

    def record(self: Any, name: str) -> Any:
        accessed.add(name)
        return original(self, name)

    hf_config = config_class(**config)
    monkeypatch.setattr(config_class, "__getattribute__", record)
    model = AutoModelForCausalLM.from_config(hf_config)
    model(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    assert {"hidden_size", "rms_norm_eps"} <= accessed, "the recording does not work"
    assert not noted & accessed
