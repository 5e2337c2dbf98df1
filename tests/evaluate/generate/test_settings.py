"""What made answers: every part that differs is named, and nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.generate.settings import differences, read_settings, write_settings

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"path": "/a", "weights": "1f", "adapter": None, "adapter_weights": None},
    "prompts": {"count": 3, "texts": "2e", "tokens": "3d"},
    "sampling": {"temperature": 0.3, "seed": 0},
    "answers": {"engine": "transformers", "stop_tokens": [2]},
    "made_with": {"device": "cpu", "torch": "2.11.0"},
}


def changed(section: str, field: str, value: Any) -> dict[str, dict[str, Any]]:
    other = copy.deepcopy(SETTINGS)
    other[section][field] = value
    return other


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "weights", "2f", "the model differs (weights or config.json)"),
        ("model", "adapter_weights", "2f", "the adapter differs"),
        ("prompts", "texts", "2f", "the prompts differ"),
        ("prompts", "count", 4, "the number of prompts is 3 there, 4 here"),
        ("sampling", "temperature", 0.7, "generate.temperature is 0.3 there, 0.7 here"),
        ("sampling", "seed", 1, "evaluate.seed is 0 there, 1 here"),
        ("answers", "engine", "vllm", "the engine is transformers there, vllm here"),
        ("made_with", "torch", "2.12.0", "the version of torch is 2.11.0 there, 2.12.0 here"),
        ("made_with", "peft", "1.0", "the version of peft is None there, 1.0 here"),
    ],
)
def test_a_difference_is_named(section: str, field: str, value: Any, message: str) -> None:
    wanted = changed(section, field, value)
    assert differences(SETTINGS, wanted, finished=False) == [message]


def test_all_differences_are_told_at_once() -> None:
    wanted = changed("sampling", "temperature", 1.0)
    wanted["prompts"]["texts"] = "ff"
    assert len(differences(SETTINGS, wanted, finished=False)) == 2


def test_a_copy_elsewhere_is_the_same_model() -> None:
    assert differences(SETTINGS, changed("model", "path", "/b"), finished=False) == []


def test_a_new_library_does_not_matter_to_finished_answers() -> None:
    wanted = changed("made_with", "torch", "9")
    assert differences(SETTINGS, wanted, finished=True) == []
    assert differences(SETTINGS, changed("model", "weights", "ff"), finished=True)


def test_settings_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "m.settings.json"
    assert read_settings(path) is None
    write_settings(path, SETTINGS)
    assert read_settings(path) == SETTINGS
    assert [file.name for file in tmp_path.iterdir()] == ["m.settings.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 1}'])
def test_a_damaged_file_is_reported(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.settings.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"m\.settings\.json"):
        read_settings(path)


def test_what_the_system_refuses_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "m.settings.json"
    path.mkdir()
    with pytest.raises(ConfigError, match=r"m\.settings\.json cannot be read: Is a directory"):
        read_settings(path)
    with pytest.raises(ConfigError, match=r"m\.settings\.json cannot be written: Is a directory"):
        write_settings(path, SETTINGS)
    assert list(tmp_path.iterdir()) == [path]
