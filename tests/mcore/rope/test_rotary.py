"""Rotary angles match Transformers for every family and scaling type, and follow position ids."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.rope.rotary import (
    RowRotary,
    attention_scale,
    inverse_frequencies,
    max_sequence_length,
)
from megatron_idpo.testing import tiny_hf_config

# cos and sin are of order 1, computed by the same fp32 operations: at most one rounding apart.
COS_SIN_TOLERANCE = 1e-7
# Scores are sums of 16 fp32 products of order 1, scaled before or after the sum.
SCORE_TOLERANCE = 5e-6

MODELING = {
    "llama": (modeling_llama, "LlamaRotaryEmbedding"),
    "mistral": (modeling_mistral, "MistralRotaryEmbedding"),
    "qwen2": (modeling_qwen2, "Qwen2RotaryEmbedding"),
    "qwen3": (modeling_qwen3, "Qwen3RotaryEmbedding"),
}
HEAD_DIM = 16
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}

TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "default, whole": {"partial_rotary_factor": 1.0},
    "theta": {"rope_theta": 5e5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3, 32": {"rope_scaling": LLAMA3 | {ORIGINAL: 32}},
    "llama3, 64": {"rope_scaling": LLAMA3 | {ORIGINAL: 64, "factor": 2}, "rope_theta": 5e5},
    "llama3, outside": {"rope_scaling": LLAMA3, ORIGINAL: 32},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 32}},
    "yarn, defaulted": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, ratio": {"rope_scaling": {"rope_type": "yarn", "factor": None, ORIGINAL: 32}},
    "yarn, all": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            ORIGINAL: 32,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
            "truncate": False,
        }
    },
    "yarn, attention": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, ORIGINAL: 64, "attention_factor": 1.5}
    },
    "longrope": {"rope_scaling": LONGROPE | {ORIGINAL: 100}},
    "longrope, factor": {"rope_scaling": LONGROPE | {ORIGINAL: 100, "factor": 6.0}},
    "longrope, outside": {"rope_scaling": LONGROPE, ORIGINAL: 100},
    "proportional": {
        "rope_parameters": {
            "rope_type": "proportional",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        }
    },
    "proportional, null": {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
}


def _config(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    base = {
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": 128,
        "max_position_embeddings": 128,
    }
    return json.loads(json.dumps(base | fields))


def _hf_rotary(config: dict[str, Any]) -> Any:
    module, name = MODELING[config["model_type"]]
    return getattr(module, name)(CONFIG_MAPPING[config["model_type"]](**config))


def _scores(query_T1D: torch.Tensor, key_T1D: torch.Tensor) -> torch.Tensor:
    return query_T1D[:, 0] @ key_T1D[:, 0].T


# A sequence, a prompt with two answers, and padding.
PACKED = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 3, 4, 90, 99])


@pytest.mark.parametrize("family", MODELING)
@pytest.mark.parametrize("name", TYPES)
def test_angles_match_transformers(family: str, name: str) -> None:
    hf_rotary = _hf_rotary(_config(family, TYPES[name]))
    architecture = Architecture.from_hf(_config(family, TYPES[name]))
    angles = RowRotary(architecture)(PACKED)
    assert angles.shape == (len(PACKED), 1, 1, HEAD_DIM) and angles.dtype == torch.float32
    cos, sin = hf_rotary(torch.zeros(1), PACKED[None])
    _, attention_factor = inverse_frequencies(architecture)
    assert attention_factor == hf_rotary.attention_scaling
    for ours, expected in ((angles.cos(), cos), (angles.sin(), sin)):
        difference = (ours[:, 0, 0] * attention_factor - expected[0]).abs().max()
        assert difference <= COS_SIN_TOLERANCE, (family, name, difference)


@pytest.mark.parametrize("name", TYPES)
def test_scores_through_megatrons_rotation_match_transformers(name: str) -> None:
    """With the attention factor in the softmax scale."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    architecture = Architecture.from_hf(_config("llama", TYPES[name]))
    hf_rotary = _hf_rotary(_config("llama", TYPES[name]))
    angles = RowRotary(architecture)(PACKED)
    torch.manual_seed(0)
    query, key = torch.randn(2, len(PACKED), 1, 1, HEAD_DIM).unbind()
    settings: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False)
    alone: Any = SimpleNamespace(size=lambda: 1)
    ours = _scores(
        *(
            apply_rotary_pos_emb(each, angles, settings, cp_group=alone)[:, 0]
            for each in (query, key)
        )
    )
    cos, sin = hf_rotary(torch.zeros(1), PACKED[None])
    rotated = modeling_llama.apply_rotary_pos_emb(
        query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), cos, sin
    )
    expected = _scores(*(each[0].transpose(0, 1) for each in rotated)) * HEAD_DIM**-0.5
    torch.testing.assert_close(
        ours * attention_scale(architecture), expected, rtol=0, atol=SCORE_TOLERANCE
    )


def test_llama3_uses_its_original_length() -> None:
    """Other converters silently assume 8192."""
    frequencies = [
        inverse_frequencies(
            Architecture.from_hf(_config("llama", {"rope_scaling": LLAMA3 | {ORIGINAL: length}}))
        )[0]
        for length in (32, 8192)
    ]
    assert (frequencies[0] - frequencies[1]).abs().max() > 0.01


def test_softmax_scale_includes_the_attention_factor() -> None:
    plain = Architecture.from_hf(_config("llama", {}))
    assert attention_scale(plain) == HEAD_DIM**-0.5
    yarn = Architecture.from_hf(_config("llama", TYPES["yarn, attention"]))
    assert attention_scale(yarn) == 1.5**2 * HEAD_DIM**-0.5


def test_frequencies_stay_fp32_and_are_not_saved() -> None:
    rotary = RowRotary(Architecture.from_hf(_config("llama", {}))).to(torch.bfloat16)
    assert rotary.inv_freq_F.dtype == torch.float32
    assert not rotary.state_dict() and not list(rotary.parameters()) and not list(rotary.buffers())


def test_frequencies_ignore_the_default_device_and_dtype() -> None:
    architecture = Architecture.from_hf(_config("llama", TYPES["yarn"]))
    expected, _ = inverse_frequencies(architecture)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            inv_freq_F = RowRotary(architecture).inv_freq_F
    finally:
        torch.set_default_dtype(before)
    assert inv_freq_F.device.type == "cpu" and torch.equal(inv_freq_F, expected)


def _settings(**fields: Any) -> SimpleNamespace:
    base = {"sequence_parallel": False, "tensor_model_parallel_size": 1, "context_parallel_size": 1}
    return SimpleNamespace(**base | fields)


def _stage(input_tensor: torch.Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(input_tensor=input_tensor)


def test_plain_sequences_start_at_position_zero_on_every_stage() -> None:
    rotary = RowRotary(Architecture.from_hf(_config("llama", {})))
    hidden = torch.zeros(6, 2, 64)
    first = rotary.get_rotary_seq_len(None, _stage(None), hidden, _settings())
    later = rotary.get_rotary_seq_len(None, _stage(hidden), None, _settings())
    assert first.tolist() == later.tolist() == list(range(6))
    shard = _settings(sequence_parallel=True, tensor_model_parallel_size=4)
    assert rotary.get_rotary_seq_len(None, _stage(hidden), None, shard).tolist() == list(range(24))
    unsharded = _settings(tensor_model_parallel_size=4)
    assert len(rotary.get_rotary_seq_len(None, _stage(hidden), None, unsharded)) == 6


def _row(position_ids: list[int], spans: list[tuple[int, int, int, int]]) -> Any:
    from megatron_idpo.mcore.attention.row_params import RowParams

    spans_G4 = torch.tensor(spans, dtype=torch.int32).reshape(-1, 4)
    return RowParams.of(torch.tensor(position_ids), spans_G4)


def test_a_row_uses_its_position_ids() -> None:
    rotary = RowRotary(Architecture.from_hf(_config("llama", {})))
    row = _row([0, 1, 2, 1, 0, 1], [(0, 1, 3, 4), (4, 6, 6, 6)])
    hidden = torch.zeros(2, 1, 64)
    shard = _settings(sequence_parallel=True, tensor_model_parallel_size=3)
    positions = rotary.get_rotary_seq_len(None, _stage(hidden), None, shard, row)
    angles = rotary(positions, packed_seq=False, cp_group=None)
    plain = rotary(rotary.get_rotary_seq_len(None, _stage(hidden), None, shard))
    assert torch.equal(angles, plain[row.position_ids_T])
    assert torch.equal(rotary(positions), angles)


def test_longrope_rejects_sequences_above_its_original_length() -> None:
    """The row may be longer, a sequence in it may not."""
    architecture = Architecture.from_hf(
        _config("llama", {"rope_scaling": LONGROPE | {ORIGINAL: 4}})
    )
    assert max_sequence_length(architecture) == 4
    rotary = RowRotary(architecture)
    hidden = torch.zeros(4, 1, 64)
    rotary.get_rotary_seq_len(None, _stage(None), hidden, _settings())
    fits = _row([0, 1, 2, 3, 2, 9, 9], [(0, 2, 4, 5)])
    rotary.get_rotary_seq_len(None, _stage(None), hidden, _settings(), fits)
    rotary.get_rotary_seq_len(None, _stage(None), hidden, _settings(), _row([0] * 9, []))
    with pytest.raises(ConfigError, match=r"5 tokens is longer than 4.*data\.max_length"):
        rotary.get_rotary_seq_len(None, _stage(None), torch.zeros(5, 1, 64), _settings())
    too_long = _row([0, 1, 2, 2, 3, 4], [(0, 2, 3, 6)])
    with pytest.raises(ConfigError, match="5 tokens is longer than 4"):
        rotary.get_rotary_seq_len(None, _stage(None), hidden, _settings(), too_long)


def test_other_rope_types_do_not_limit_the_sequence_length() -> None:
    assert max_sequence_length(Architecture.from_hf(_config("llama", TYPES["yarn"]))) is None


def test_queries_that_grow_with_their_position_limit_the_sequence_length() -> None:
    """Up to the limit Ministral 3 scales every query by 1."""
    rotary = RowRotary(Architecture.from_hf(tiny_hf_config("ministral3")))
    rotary.get_rotary_seq_len(None, _stage(None), torch.zeros(64, 1, 64), _settings())
    with pytest.raises(ConfigError, match="65 tokens is longer than 64, above which queries"):
        rotary.get_rotary_seq_len(None, _stage(None), torch.zeros(65, 1, 64), _settings())


VALID_NUMBERS = st.sampled_from([1.5, 2, 2.5, 4, 16, 32.0])
INVALID = st.sampled_from([0.5, 1, None, 0, -1, True, "2", [2.0] * 8, [1.5], [None] * 8])
LISTS = st.lists(VALID_NUMBERS, min_size=8, max_size=8)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "short_factor": LISTS,
    "long_factor": LISTS,
    "truncate": st.booleans(),
    "partial_rotary_factor": st.sampled_from([1, 1.0, 1.0, 0.5]),
    ORIGINAL: st.sampled_from([32, 64, 100, 128, 8192]),
    "rope_theta": st.sampled_from([2, 1e4, 5e5]),
}
READ_BY = {
    "default": "",
    "linear": "factor",
    "proportional": "factor",
    "llama3": f"factor low_freq_factor high_freq_factor {ORIGINAL}",
    "yarn": f"factor {ORIGINAL} attention_factor beta_fast beta_slow "
    "mscale mscale_all_dim truncate",
    "longrope": f"factor {ORIGINAL} attention_factor short_factor long_factor",
}


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Parameters of one rope type, sometimes with a missing or an invalid value."""
    rope_type = draw(st.sampled_from(sorted({"default", *ROPE_INIT_FUNCTIONS})))
    names = [*READ_BY.get(rope_type, "factor").split(), "rope_theta", "partial_rotary_factor"]
    dropped = draw(st.sets(st.sampled_from(names), max_size=4))
    invalid = draw(st.sets(st.sampled_from(names), max_size=1))
    values = {name: VALID.get(name, VALID_NUMBERS) for name in names if name not in dropped}
    values |= {name: INVALID for name in invalid}
    return {"rope_type": rope_type, **draw(st.fixed_dictionaries(values))}


@settings(max_examples=150, deadline=None)
@given(rope=rope_parameters(), original_at_top_level=st.booleans())
def test_any_rope_parameters_match_transformers_or_are_rejected(
    rope: dict[str, Any], original_at_top_level: bool
) -> None:
    fields: dict[str, Any] = {"rope_parameters": rope}
    if original_at_top_level and ORIGINAL in rope:
        fields = {ORIGINAL: rope.pop(ORIGINAL), **fields}
    try:
        architecture = Architecture.from_hf(_config("llama", fields))
    except ConfigError as error:
        assert "config.json" in str(error)
        return
    hf_rotary = _hf_rotary(_config("llama", fields))
    event(f"accepted: {rope['rope_type']}")
    inv_freq_F, attention_factor = inverse_frequencies(architecture)
    assert torch.equal(inv_freq_F, hf_rotary.inv_freq)
    assert attention_factor == hf_rotary.attention_scaling
