"""The name table lists exactly the tensors of Transformers and the parameters of megatron-core."""

import json
from typing import Any

import pytest
from safetensors import safe_open

from megatron_idpo.convert.families import entry, hf_shapes
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import start_layout
from megatron_idpo.testing import TINY_FAMILIES, tiny_hf_config, write_tiny_hf_model

OVERRIDES: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "odd": {"vocab_size": 509, "num_key_value_heads": 1, "intermediate_size": 36},
}
MODELS = [
    pytest.param(
        family,
        name,
        marks=[] if name == "odd" or family in TINY_FAMILIES[:6] else [pytest.mark.exhaustive],
    )
    for family in TINY_FAMILIES
    for name in OVERRIDES
]


def architecture_of(family: str, overrides: str) -> Architecture:
    return Architecture.from_hf(tiny_hf_config(family, **OVERRIDES[overrides]))


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_shapes_equal_what_transformers_saves(family, overrides, tmp_path):
    write_tiny_hf_model(tmp_path, family, **OVERRIDES[overrides])
    config = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert hf_shapes(Architecture.from_hf(config)) == saved


def parameters_of_stages(family: str, overrides: str) -> dict[str, list[tuple[str, ...]]]:
    """On every rank: this stage's parameters with their Hugging Face tensors."""
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.model.build import build_model, global_parameters

    architecture = architecture_of(family, overrides)
    layout = Layout(pipeline=2, virtual_pipeline=2)
    start_layout(layout)
    chunks = build_model(architecture, layout)
    return {name: entry(name, architecture).hf_names for name, _ in global_parameters(chunks)}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", "tied"), ("qwen2", "default"), ("qwen3", "default")]
)
def test_every_parameter_has_its_tensors(family, overrides, workers):
    """All stages together have every tensor once, a tied embedding twice."""
    by_stage = workers.run(parameters_of_stages, 2, family, overrides)
    named = [name for stage in by_stage for names in stage.values() for name in names]
    expected = list(hf_shapes(architecture_of(family, overrides)))
    if overrides == "tied":
        expected.append("model.embed_tokens.weight")
    assert sorted(named) == sorted(expected)


def test_transformer_engine_names_have_the_same_tensors():
    architecture = architecture_of("llama", "default")
    for engine, local in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        lines = [entry(f"decoder.layers.3.{name}", architecture) for name in (engine, local)]
        assert lines[0].hf_shapes == lines[1].hf_shapes
        assert "model.layers.3." in lines[0].hf_names[0]


def test_unknown_parameter_is_an_internal_error():
    with pytest.raises(KeyError):
        entry("decoder.layers.0.mlp.router.weight", architecture_of("llama", "default"))


def test_tensors_are_listed_from_input_to_output():
    names = list(hf_shapes(architecture_of("qwen3", "default")))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)
