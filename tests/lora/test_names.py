"""Names and sizes: those that PEFT gives an adapter of a real model."""

import pytest
from safetensors.torch import load_file

from megatron_idpo.config.lora import PROJECTIONS
from megatron_idpo.lora.names import adapter_shape, peft_name, weight_shape
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.testing import tiny_hf_config

from .lora_case import MODELS, SETTINGS


@pytest.mark.parametrize("model", ["qwen3", "llama-tied"])
def test_names_and_shapes_are_pefts(model, peft_adapter):
    family, overrides = MODELS[model]
    architecture = Architecture.from_hf(tiny_hf_config(family, **overrides))
    rank = SETTINGS["all"].rank
    ours = {
        peft_name(layer, projection, side): adapter_shape(projection, side, rank, architecture)
        for layer in range(architecture.num_layers)
        for projection in PROJECTIONS
        for side in "AB"
    }
    theirs = load_file(peft_adapter(model) / "adapter_model.safetensors")
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_sizes_of_a_head_dimension_of_its_own():
    architecture = Architecture.from_hf(tiny_hf_config("qwen3"))
    assert weight_shape("q_proj", architecture) == (8 * 16, 64)
    assert weight_shape("v_proj", architecture) == (4 * 16, 64)
    assert weight_shape("o_proj", architecture) == (64, 8 * 16)
