"""Small files of results: whole, replaced, and told where they cannot be."""

from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.text_file import write_text


def test_it_appears_in_a_new_directory_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "advice.md"
    for text in ("first", "änderung"):
        write_text(path, text)
        assert path.read_text("utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["advice.md"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "advice.md"
    write_text(path, "first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot write .*No space left"):
        write_text(path, "second")
    assert path.read_text() == "first"
