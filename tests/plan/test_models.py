"""Sizes of models: from config.json, from the table, and how many parameters they have."""

import json
import math
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from megatron_idpo.convert.families import hf_shapes
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.families import FAMILIES
from megatron_idpo.plan.models import FAMILY_FIELDS, ModelSizes, find_model

from .layout_cases import HF_CONFIGS, MIXTRAL, QWEN3_MOE, llama

FILES = sorted(HF_CONFIGS.glob("*.json"))
EXPERTS = [llama(2, 64, 4, 2, 96, **MIXTRAL), llama(2, 64, 4, 2, 96, **QWEN3_MOE)]

DENSE = [
    CONFIG_MAPPING[family](num_hidden_layers=4).to_dict()
    for family in FAMILY_FIELDS
    if family not in ("mixtral", "qwen3_moe")
]
"""Transformers' defaults of each family."""


@pytest.mark.parametrize(
    "config",
    [*(json.loads(f.read_text()) for f in FILES), *EXPERTS, *DENSE],
    ids=lambda config: config["model_type"],
)
def test_sizes_and_parameters_equal_those_of_the_checked_architecture(config):
    sizes, architecture = ModelSizes.from_hf(config, "config.json"), Architecture.from_hf(config)
    for name in ModelSizes.__dataclass_fields__:
        assert getattr(sizes, name) == getattr(architecture, name), name
    assert sizes.parameters == sum(map(math.prod, hf_shapes(architecture).values()))


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-instruct-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-instruct-v0.3"),
        ("upstage/SOLAR-10.7B-Instruct-v1.0", "solar-10.7b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("runs/smollm2", "smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_known_models_have_the_sizes_of_their_config(path, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a checkout may have the model of the quickstart
    config = json.loads((HF_CONFIGS / f"{file}.json").read_text())
    found = find_model(path)
    assert not found.is_here
    assert found.sizes == ModelSizes.from_hf(config, file)


def test_a_directory_is_preferred_to_the_table(tmp_path: Path):
    directory = tmp_path / "Llama-3.1-8B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(llama(2, 64, 4, 2, 96)))
    found = find_model(str(directory))
    assert found.is_here and found.sizes.num_layers == 2


@pytest.mark.parametrize(
    "path",
    [
        "org/unknown-7b",
        "org/Llama-3.1-80B",
        # Names that begin like those of the table, of models with other sizes.
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "HuggingFaceTB/SmolLM2-360M",
        "HuggingFaceH4/zephyr-7b-gemma-v0.1",
        "org/Llama-3-8B-pruned",
        "mistralai/Mixtral-8x7B-v0.2",
        "org/meta-mistral-7b-instruct-hf-v0.3",
    ],
)
def test_unknown_models_are_refused_with_a_remedy(path):
    with pytest.raises(ConfigError, match="download its config"):
        find_model(path)


@pytest.mark.parametrize("path", ["no/such/directory", "./model", "/model"])
def test_a_path_that_cannot_be_a_hub_name_is_not_offered_for_download(path):
    with pytest.raises(ConfigError, match=f"{path} is not a directory; name a model directory"):
        find_model(path)


def test_a_config_without_sizes_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ConfigError, match="has no num_hidden_layers"):
        find_model(str(tmp_path))


def test_families_are_those_that_can_be_trained():
    assert FAMILY_FIELDS.keys() == FAMILIES.keys()


def test_what_a_file_leaves_out_is_what_transformers_takes():
    for family in ("glm", "glm4", "qwen2_moe"):
        config = CONFIG_MAPPING[family]().to_dict()
        del config["qkv_bias" if family == "qwen2_moe" else "attention_bias"]
        assert ModelSizes.from_hf(config, "x").qkv_bias == Architecture.from_hf(config).qkv_bias


def test_layers_without_experts_are_refused():
    for fields in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        config = llama(2, 64, 4, 2, 96, **QWEN3_MOE, **fields)
        with pytest.raises(ConfigError, match="has layers without experts"):
            ModelSizes.from_hf(config, "config.json")


def test_other_families_are_refused():
    with pytest.raises(ConfigError, match="'falcon' is not supported"):
        ModelSizes.from_hf({"model_type": "falcon"}, "config.json")
