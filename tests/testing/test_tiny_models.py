"""Tiny models are what Transformers reads, random in every weight, and reproducible."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_idpo.testing import TINY_FAMILIES, tiny_hf_config, write_tiny_hf_model

OVERRIDES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "window": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "scaled": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
}


OTHER_ROPE = {"ministral3", "phi3", "olmo3"}
"""Families whose config classes refuse this rope, or have other fields there."""


FIRST = TINY_FAMILIES[:6]
"""With every override in `make test`."""


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        pytest.param(
            family,
            OVERRIDES[name],
            id=f"{family}-{name}",
            marks=[] if name == "plain" or family in FIRST else [pytest.mark.exhaustive],
        )
        for family in TINY_FAMILIES
        for name in OVERRIDES
        if name != "scaled" or family not in OTHER_ROPE
    ],
)
def test_transformers_loads_the_written_model(tmp_path, family, overrides):
    assert write_tiny_hf_model(tmp_path, family, **overrides) == tmp_path
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family
    for name, value in overrides.items():
        if not (family in ("llama", "mistral") and "window" in name):
            assert config[name] == value
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, 256)
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) != config["tie_word_embeddings"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.std() > 0 for weight in weights.values()), (
        "a constant tensor would hide mix-ups"
    )


def test_sliding_window_changes_the_logits(tmp_path):
    tokens = torch.arange(20)[None]
    logits = []
    for window in (None, 4):
        write_tiny_hf_model(tmp_path, "mistral", sliding_window=window)
        logits.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits)
    assert torch.equal(logits[0][:, :4], logits[1][:, :4])
    assert not torch.allclose(logits[0][:, -1], logits[1][:, -1])


def test_seed_determines_the_weights_without_changing_the_global_generator(tmp_path):
    state = torch.get_rng_state()
    first, same, other = (
        load_file(write_tiny_hf_model(tmp_path / name, "qwen2", seed=seed) / "model.safetensors")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_config_is_json_and_a_new_object_each_time():
    config = tiny_hf_config("llama", vocab_size=300)
    assert json.loads(json.dumps(config)) == config
    assert config["vocab_size"] == 300
    assert tiny_hf_config("llama")["vocab_size"] == 256


def test_unknown_family_is_rejected():
    with pytest.raises(ValueError, match="no tiny model of 'gpt2'; choose one of llama"):
        tiny_hf_config("gpt2")
