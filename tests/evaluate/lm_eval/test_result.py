"""Result files: round trip, damaged files, other settings."""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.lm_eval.result import H4Result, check_same_settings, read_result
from megatron_idpo.evaluate.lm_eval.tasks import TaskResult

SETTINGS: dict[str, Any] = {
    "weights": "a" * 64,
    "adapter": None,
    "tokenizer": None,
    "dtype": "fp32",
    "limit": None,
    "source": "files",
    "lm_eval": "0.4.13",
}
FILES = {"mmlu": {"mmlu.jsonl": "b" * 64}}


def result(**settings: Any) -> H4Result:
    tasks = {"mmlu": TaskResult("acc", 0.25, 0.1, 12, 5, "split dev", 0, {"mmlu.jsonl": "b" * 64})}
    return H4Result("one", {**SETTINGS, **settings}, "items", tasks)


def test_written_result_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "h4" / "one.json"
    path.parent.mkdir()
    result().write(path)
    assert read_result(path) == result()


@pytest.mark.parametrize("text", [None, "{}", "[]", "nonsense", '{"tasks": {"mmlu": 3}}'])
def test_other_file_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "one.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"one\.json: .*; remove it and run `h4` again"):
        read_result(path)


def test_same_settings_and_files_of_other_tasks_pass() -> None:
    other_task = {"hellaswag": {"h.jsonl": "c" * 64}}
    check_same_settings(Path("one.json"), result(), SETTINGS, {**FILES, **other_task})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16"}, "model.dtype was fp32, is now bf16"),
        ({"limit": 4}, "h4.limit was not set, is now 4"),
        ({"weights": "c" * 64}, "the model's files differs"),
        ({"adapter": "c" * 64}, "the adapter's files differs"),
        ({"source": "hub"}, "h4.items was files, is now hub"),
    ],
)
def test_other_settings_are_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_settings(Path("one.json"), result(), {**SETTINGS, **settings}, FILES)
    assert message in str(caught.value) and "remove the file" in str(caught.value)


def test_changed_items_are_reported() -> None:
    with pytest.raises(ConfigError, match="the items of mmlu differ"):
        check_same_settings(Path("one.json"), result(), SETTINGS, {"mmlu": {"m.jsonl": "c" * 64}})
