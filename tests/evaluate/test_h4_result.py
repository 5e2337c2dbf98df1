"""A model's file: what is written is read, and what was measured otherwise is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.lm_eval.backend import Measured
from megatron_idpo.evaluate.lm_eval.result import H4Result, check_same, read_result

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
    tasks = {"mmlu": Measured("acc", 0.25, 0.1, 12, 5, "split dev", 0)}
    return H4Result("one", {**SETTINGS, **settings}, "items", tasks, dict(FILES))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "h4" / "one.json"
    assert read_result(path) is None
    result().write(path)
    assert read_result(path) == result()


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"tasks": {"mmlu": 3}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no result of h4"):
        read_result(path)


def test_the_same_settings_and_other_tasks_files_pass() -> None:
    check_same(Path("one.json"), result(), result(), {**FILES, "hellaswag": {"h.jsonl": "c" * 64}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16"}, "model.dtype was fp32, here bf16"),
        ({"limit": 4}, "h4.limit was null, here 4"),
        ({"weights": "c" * 64}, "the model's files differ"),
        ({"adapter": "c" * 64}, "the adapter's files differ"),
        ({"source": "hub"}, "h4.items was files, here hub"),
    ],
)
def test_other_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same(Path("one.json"), result(), result(**settings), FILES)
    assert message in str(caught.value) and "remove the file" in str(caught.value)


def test_changed_items_are_named() -> None:
    with pytest.raises(ConfigError, match="the items of mmlu differ"):
        check_same(Path("one.json"), result(), result(), {"mmlu": {"mmlu.jsonl": "c" * 64}})
