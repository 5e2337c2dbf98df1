"""PEFT's files, there and back, in any layout; what we cannot mean is refused by name."""

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
from megatron_idpo.lora.peft_config import peft_config, read_peft_settings

from .conftest import hf_model
from .lora_case import SETTINGS, tokens
from .lora_run import adapted, merged, whole

TP2, PP2_VP2 = Layout(tensor=2), Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2_SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    ],
)
def test_there_and_back_is_exact(
    layout, data, model, settings, workers, base_model, peft_adapter, peft_answer, tmp_path
):
    from peft import PeftModel

    base, adapter, target = base_model(model), peft_adapter(model, settings), tmp_path / "adapter"
    world = layout.model_ranks * data
    for _ in range(2):  # an adapter that is there already is replaced
        workers.run(resave, world, str(base), str(adapter), settings, layout, str(target))
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]
    ours, theirs = load_file(target / WEIGHTS), load_file(adapter / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    wrapped = PeftModel.from_pretrained(hf_model(base), target)
    assert wrapped.peft_config["default"].base_model_name_or_path == str(base)
    with torch.no_grad():
        logits = wrapped(tokens(wrapped.config.vocab_size, 0)[:, :-1]).logits
    assert torch.equal(logits, peft_answer(model, settings)["logits"])
    found = read_peft_settings(target)
    assert found == SETTINGS[settings] and found == read_peft_settings(adapter)


def load(base: str, adapter: str, layout: Layout, settings: LoraConfig, **options: Any) -> Any:
    """The whole adapters, or what the user is told."""
    try:
        return whole(adapted(base, layout, settings, adapter, **options)[2])
    except CheckpointError as error:
        return str(error)


@pytest.mark.distributed
def test_another_format_is_cast(workers, base_model, peft_adapter):
    base, adapter = base_model("qwen2"), peft_adapter("qwen2")
    arguments = (str(base), str(adapter), TP2, SETTINGS["all"])
    found = merged(workers.run(load, 2, *arguments, dtype=torch.bfloat16))
    theirs = load_file(adapter / WEIGHTS)
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in theirs.items())


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
        ({"layers_to_transform": [0]}, "layers_to_transform: is [0]"),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules: is ['k_proj']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: is [[0, 2]]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: is [1]"),
        ({"an_option_of_tomorrow": 0.5}, "an_option_of_tomorrow: is 0.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: is 'pissa', which changes the base"),
        ({"target_modules": ".*proj"}, "target_modules: is the pattern '.*proj'"),
        ({"target_modules": None}, "target_modules: is None"),
        ({"target_modules": ["lm_head"]}, "lora.targets: is ['lm_head']"),
        ({"peft_type": "LOHA"}, "peft_type: is 'LOHA', only LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type: is 'SEQ_CLS', only CAUSAL_LM"),
        ({"r": 0}, "lora.rank: is 0"),
        ({"lora_alpha": "many"}, "does not describe an adapter"),
    ],
)
def test_options_we_do_not_have_are_named(fields, message, peft_adapter, tmp_path):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed", **fields)
    with pytest.raises(CheckpointError) as error:
        read_peft_settings(directory)
    assert message in str(error.value) and str(directory / CONFIG) in str(error.value)


def test_all_refused_options_come_at_once(peft_adapter, tmp_path):
    fields = {"use_dora": True, "bias": "all", "peft_type": "IA3"}
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed", **fields)
    with pytest.raises(CheckpointError, match="3 problems"):
        read_peft_settings(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.3, "revision": "main", "inference_mode": False, "task_type": None},
        {"init_lora_weights": "gaussian", "peft_version": "9.9", "an_option_of_tomorrow": None},
        {"target_modules": ["down_proj", "up_proj", "q_proj", "gate_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": "all-linear"},
    ],
)
def test_what_changes_no_number_is_read(fields, peft_adapter, tmp_path):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed", **fields)
    found = read_peft_settings(directory)
    assert found.dropout == fields.get("lora_dropout", 0.0)
    assert (found.rank, found.alpha, found.projections) == (4, 12.0, SETTINGS["all"].projections)


@pytest.mark.distributed
def test_other_settings_are_refused_field_by_field(workers, base_model, peft_adapter):
    other = LoraConfig(rank=8, alpha=3.0, targets=("q_proj",), rslora=True)
    base, adapter = base_model("llama-tied"), peft_adapter("llama-tied")
    for message in workers.run(load, 2, str(base), str(adapter), TP2, other):
        assert "r: is 4, and 8 in this model; make them equal" in message
        assert "lora_alpha: is 12.0, and 3.0" in message
        assert "use_rslora: is False, and True" in message
        assert "and ['q_proj'] in this model" in message


def spoil(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = next(iter(sorted(tensors)))
    if how == "missing":
        del tensors[first]
    elif how == "unexpected":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    elif how == "shape":
        tensors[first] = tensors[first][:, :-1].contiguous()
    else:
        tensors[first] = tensors[first].to(torch.int8)
    return tensors


NAME = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", f"tensor '{NAME}' of shape (4, 128) is missing"),
        ("unexpected", "unexpected tensor 'base_model.model.lm_head.lora_A.weight'"),
        ("shape", f"tensor '{NAME}' has shape (4, 127), expected (4, 128)"),
        ("integers", f"tensor '{NAME}' is stored as torch.int8"),
    ],
)
def test_wrong_tensors_are_named(how, reason, workers, base_model, peft_adapter, tmp_path):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed")
    save_file(spoil(load_file(directory / WEIGHTS), how), directory / WEIGHTS)
    arguments = (str(base_model("llama-tied")), str(directory), Layout(), SETTINGS["all"])
    (message,) = workers.run(load, 1, *arguments)
    assert reason in message


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("absent", "reason"),
    [
        (WEIGHTS, f"{WEIGHTS}: does not exist; name the directory that PEFT's"),
        (CONFIG, f"{CONFIG}: cannot be read: No such file or directory"),
    ],
)
def test_a_missing_file_is_named(absent, reason, workers, base_model, peft_adapter, tmp_path):
    directory = with_config(peft_adapter("llama-tied"), tmp_path / "changed")
    (directory / absent).unlink()
    arguments = (str(base_model("llama-tied")), str(directory), Layout(), SETTINGS["all"])
    (message,) = workers.run(load, 1, *arguments)
    assert reason in message
    (directory / "adapter_model.bin").touch()
    (message,) = workers.run(load, 1, *arguments)
    assert ("adapter_model.bin" in message) == (absent == WEIGHTS)


def test_the_base_model_is_found_from_everywhere(monkeypatch, tmp_path):
    """A directory by its absolute path; a name that is none stays a hub name."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base, written in (
        ("models/mine", str(tmp_path / "models" / "mine")),
        ("org/model", "org/model"),
    ):
        assert peft_config(SETTINGS["all"], base)["base_model_name_or_path"] == written


def save_where_it_cannot(base: str, target: str) -> str:
    from megatron_idpo.lora.peft import save_peft

    _, architecture, adapters = adapted(base, TP2, SETTINGS["all"])
    try:
        save_peft(adapters, architecture, Path(target), base_model=base)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_something_else_is_not_overwritten(workers, base_model, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    message = workers.run(save_where_it_cannot, 2, str(base_model("llama-tied")), str(tmp_path))
    assert all("is not overwritten, because it holds something else" in one for one in message)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
