"""Adapters in PEFT's files: round trips in any layout, unsupported options, damaged files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.adapter_config import peft_config, read_peft_settings
from megatron_idpo.lora.adapters import weight_shape
from megatron_idpo.lora.peft import peft_shapes
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.testing import tiny_hf_config

from .conftest import hf_model
from .lora_case import MODELS, SETTINGS, tokens
from .lora_run import adapted, merged, whole

TP2, PP2_VP2 = Layout(tensor=2), Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2_SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)

EP2_TP2_PP2 = Layout(expert=2, expert_tensor=1, tensor=2, pipeline=2, sequence_parallel=True)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("qwen3", "all"),
        ("llama-tied", "all"),
        ("qwen3-moe", "experts"),
        ("mixtral", "expert-down"),
        ("qwen3-moe", "expert-modules"),
    ],
)
def test_names_and_shapes_equal_peft(model, settings, peft_adapter):
    family, overrides = MODELS[model]
    architecture = Architecture.from_hf(tiny_hf_config(family, **overrides))
    saved = load_file(peft_adapter(model, settings) / WEIGHTS)
    expected = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert peft_shapes(SETTINGS[settings], architecture) == expected


def test_weight_shape_uses_the_configured_head_dimension():
    architecture = Architecture.from_hf(tiny_hf_config("qwen3"))
    assert weight_shape("q_proj", architecture) == (8 * 16, 64)
    assert weight_shape("v_proj", architecture) == (4 * 16, 64)
    assert weight_shape("o_proj", architecture) == (64, 8 * 16)


def meaning(settings: LoraConfig) -> tuple[Any, ...]:
    """Everything but the notation of the targets, which PEFT stores as a set."""
    ranks = {name: settings.rank_of(name) for name in settings.names}
    return settings.rank, settings.alpha, settings.dropout, settings.rslora, ranks


def resave(base: str, adapter: str, settings: str, layout: Layout, target: str) -> None:
    from megatron_idpo.lora.peft import save_peft

    _, architecture, adapters = adapted(base, layout, SETTINGS[settings], adapter)
    save_peft(adapters, architecture, Path(target), base_model=base)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "data", "model", "settings"),
    [
        (Layout(), 2, "qwen2", "all"),
        (TP2_PP2_SP, 1, "qwen3", "rslora"),
        (PP2_VP2, 1, "llama-tied", "gate-down"),
        (EP2_TP2_PP2, 1, "mixtral", "experts"),
        (EP2_TP2_PP2, 1, "qwen3-moe", "expert-modules"),
    ],
)
def test_round_trip_through_peft_files_is_bitwise_exact(
    layout, data, model, settings, workers, base_model, peft_adapter, peft_result, tmp_path
):
    from peft import PeftModel

    base, adapter, target = base_model(model), peft_adapter(model, settings), tmp_path / "adapter"
    world = layout.model_ranks * data
    for _ in range(2):  # the second call replaces an existing adapter
        workers.run(resave, world, str(base), str(adapter), settings, layout, str(target))
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]
    saved, original = load_file(target / WEIGHTS), load_file(adapter / WEIGHTS)
    assert saved.keys() == original.keys()
    assert all(torch.equal(original[name], tensor) for name, tensor in saved.items())
    wrapped = PeftModel.from_pretrained(hf_model(base), target)
    assert wrapped.peft_config["default"].base_model_name_or_path == str(base)
    with torch.no_grad():
        logits = wrapped(tokens(wrapped.config.vocab_size, 0)[:, :-1]).logits
    assert torch.equal(logits, peft_result(model, settings)["logits"])
    assert meaning(read_peft_settings(target)) == meaning(SETTINGS[settings])
    assert meaning(read_peft_settings(adapter)) == meaning(SETTINGS[settings])


def load(base: str, adapter: str, layout: Layout, settings: LoraConfig, **options: Any) -> Any:
    """The whole adapters, or the error message."""
    try:
        return whole(adapted(base, layout, settings, adapter, **options)[2])
    except CheckpointError as error:
        return str(error)


@pytest.mark.distributed
def test_loading_casts_to_the_adapters_dtype(workers, base_model, peft_adapter):
    base, adapter = base_model("qwen2"), peft_adapter("qwen2")
    arguments = (str(base), str(adapter), TP2, SETTINGS["all"])
    loaded = merged(workers.run(load, 2, *arguments, dtype=torch.bfloat16))
    original = load_file(adapter / WEIGHTS)
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in original.items())


GATE_UP = r".*\.gate_up_proj"


def with_config(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of an adapter with some fields of its configuration changed."""
    shutil.copytree(source, target)
    config = json.loads((target / CONFIG).read_text()) | fields
    (target / CONFIG).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora: is True, which is not supported"),
        ({"bias": "all"}, "bias: is 'all'"),
        ({"lora_bias": True}, "lora_bias: is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: is ['lm_head']"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern: is {'q_proj': 3}"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern: is {'q_proj': 3}"),
        (
            {"rank_pattern": {GATE_UP: 8}, "alpha_pattern": {GATE_UP: 12}},
            "gate_up_proj': 12}, which is not supported",
        ),
        ({"layers_to_transform": [0]}, "layers_to_transform: is [0]"),
        (
            {"exclude_modules": r".*\.0\..*k_proj"},
            "which excludes k_proj in some layers only; merge",
        ),
        ({"exclude_modules": "("}, "exclude_modules: '(' is not a regular expression"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: is [[0, 2]]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: is [1]"),
        ({"option_of_a_later_version": 0.5}, "option_of_a_later_version: is 0.5"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: is 'pissa', which also changes the base",
        ),
        ({"target_modules": ".*proj"}, "target_modules: is the pattern '.*proj'"),
        ({"target_modules": None}, "target_modules: is None"),
        ({"target_parameters": ["mlp.gate.weight"]}, "['mlp.gate.weight'], only mlp.experts.gate"),
        ({"target_modules": ["lm_head"]}, "lora.targets: is ['lm_head']"),
        ({"peft_type": "LOHA"}, "peft_type: is 'LOHA', only LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type: is 'SEQ_CLS', only CAUSAL_LM"),
        ({"r": 0}, "lora.rank: is 0"),
        ({"lora_alpha": "many"}, "does not describe an adapter"),
    ],
)
def test_unsupported_options_are_reported_by_name(fields, message, peft_adapter, tmp_path):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed", **fields)
    with pytest.raises(CheckpointError) as error:
        read_peft_settings(directory)
    assert message in str(error.value) and str(directory / CONFIG) in str(error.value)


def test_all_unsupported_options_are_reported_at_once(peft_adapter, tmp_path):
    fields = {"use_dora": True, "bias": "all", "peft_type": "IA3"}
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed", **fields)
    with pytest.raises(CheckpointError, match="3 problems"):
        read_peft_settings(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.3, "revision": "main", "inference_mode": False, "task_type": None},
        {"init_lora_weights": "gaussian", "peft_version": "9.9", "option_of_a_later_version": None},
        {
            "target_modules": [
                "down_proj",
                "up_proj",
                "q_proj",
                "gate_proj",
                "k_proj",
                "v_proj",
                "o_proj",
            ]
        },
        {"target_modules": "all-linear"},
        {"exclude_modules": ["lm_head"]},
        {"exclude_modules": "lm_head|.*vision.*"},
    ],
)
def test_options_without_effect_on_the_output_are_accepted(fields, peft_adapter, tmp_path):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed", **fields)
    settings = read_peft_settings(directory)
    assert settings.dropout == fields.get("lora_dropout", 0.0)
    assert (settings.rank, settings.alpha, settings.projections) == (
        4,
        12.0,
        SETTINGS["all"].projections,
    )


@pytest.mark.distributed
def test_settings_that_differ_from_the_model_are_reported_by_field(
    workers, base_model, peft_adapter
):
    other = LoraConfig(rank=8, alpha=3.0, targets=("q_proj",), rslora=True)
    base, adapter = base_model("llama-tied"), peft_adapter("llama-tied")
    for message in workers.run(load, 2, str(base), str(adapter), TP2, other):
        assert "r was 4, is now 8; make the section lora and the adapter equal" in message
        assert "lora_alpha was 12.0, is now 3.0" in message
        assert "use_rslora was False, is now True" in message
        assert "is now ['q_proj']" in message


def damage(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    first = next(iter(sorted(tensors)))
    if kind == "missing":
        del tensors[first]
    elif kind == "unexpected":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    elif kind == "shape":
        tensors[first] = tensors[first][:, :-1].contiguous()
    else:
        tensors[first] = tensors[first].to(torch.int8)
    return tensors


NAME = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", f"tensor '{NAME}' of shape (4, 128) is missing"),
        ("unexpected", "unexpected tensor 'base_model.model.lm_head.lora_A.weight'"),
        ("shape", f"tensor '{NAME}' has shape (4, 127), expected (4, 128)"),
        ("integers", f"tensor '{NAME}' is stored as torch.int8"),
    ],
)
def test_damaged_tensors_are_reported_by_name(
    kind, reason, workers, base_model, peft_adapter, tmp_path
):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed")
    save_file(damage(load_file(directory / WEIGHTS), kind), directory / WEIGHTS)
    arguments = (str(base_model("llama-tied")), str(directory), Layout(), SETTINGS["all"])
    (message,) = workers.run(load, 1, *arguments)
    assert reason in message


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("absent", "reason"),
    [
        (WEIGHTS, f"{WEIGHTS}: does not exist; name the directory that PEFT's"),
        (CONFIG, f"{CONFIG}: cannot be read: No such file or directory; name the directory"),
    ],
)
def test_missing_file_is_reported_by_name(
    absent, reason, workers, base_model, peft_adapter, tmp_path
):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed")
    (directory / absent).unlink()
    arguments = (str(base_model("llama-tied")), str(directory), Layout(), SETTINGS["all"])
    (message,) = workers.run(load, 1, *arguments)
    assert reason in message
    (directory / "adapter_model.bin").touch()
    (message,) = workers.run(load, 1, *arguments)
    assert ("adapter_model.bin" in message) == (absent == WEIGHTS)


def test_base_model_is_written_as_it_is_given():
    architecture = Architecture.from_hf(tiny_hf_config("llama"))
    for base in ("../../models/base", "org/model"):
        assert peft_config(SETTINGS["all"], architecture, base)["base_model_name_or_path"] == base


def save_error(base: str, target: str) -> str:
    from megatron_idpo.lora.peft import save_peft

    _, architecture, adapters = adapted(base, TP2, SETTINGS["all"])
    try:
        save_peft(adapters, architecture, Path(target), base_model=base)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_directory_with_other_files_is_not_overwritten(workers, base_model, tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    messages = workers.run(save_error, 2, str(base_model("llama-tied")), str(tmp_path))
    assert all(
        "exists and is not a directory of Hugging Face weights" in message for message in messages
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
