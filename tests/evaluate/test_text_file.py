"""Small files of results: whole, replaced, and told where they cannot be."""

from pathlib import Path
from typing import Literal

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.result_files import appearing, only_writer, telling, write_text


def test_it_appears_in_a_new_directory_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "advice.md"
    for text in ("first", "änderung"):
        write_text(path, text)
        assert path.read_text("utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["advice.md"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "advice.md"
    write_text(path, "first")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot write .*No space left"):
        write_text(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_do_not_share_a_file_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = []
    monkeypatch.setattr("os.replace", lambda fresh, _: grown.append((fresh, fresh.read_text())))
    write_text(tmp_path / "advice.md", "mine")
    monkeypatch.setattr("os.getpid", lambda: -1)
    write_text(tmp_path / "advice.md", "theirs")
    (one, mine), (other, theirs) = grown
    assert (mine, theirs) == ("mine", "theirs") and one != other


def test_what_fails_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    """The first file stays, also where the block itself is what the disk refuses."""
    path = tmp_path / "report.html"
    write_text(path, "first")
    message = r"^--output: cannot write .*report\.html: No space left"
    with pytest.raises(ConfigError, match=message), appearing(path, location="--output") as fresh:
        fresh.write_bytes(b"hal")
        full()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_an_end_of_any_kind_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "report.html") as fresh:
        fresh.write_bytes(b"hal")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "verdicts.jsonl"
    for _ in range(2):
        with only_writer(path):
            message = rf"^evaluate\.output: {path} is being written by another process; wait"
            with pytest.raises(ConfigError, match=message), only_writer(path):
                pass
    (tmp_path / "file").touch()
    message = r"^evaluate\.output: .*file/\.one\.lock cannot be written: .*xist|Not a dir"
    with pytest.raises(ConfigError, match=message), only_writer(tmp_path / "file" / "one"):
        pass


@pytest.mark.parametrize("done", ["read", "written"])
def test_what_the_system_refuses_is_reported(
    tmp_path: Path, done: Literal["read", "written"]
) -> None:
    with (
        pytest.raises(ConfigError, match=rf"^evaluate\.output: {tmp_path} cannot be {done}: No"),
        telling(tmp_path, done),
    ):
        full()


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")
