"""Files and directories appear under their name complete, or not at all."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage import atomic


def work(target: Path, token: str = "one", *, overwrite: bool = False, text: str = "new") -> Path:
    directory = atomic.begin_directory(target, token, overwrite=overwrite)
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_text(text)
    return directory


def test_directory_appears_only_when_published(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "result"
    directory = work(target)
    assert not target.exists() and atomic.leftovers(target) == [directory]
    atomic.publish_directory(directory, target)
    assert (target / "sub" / "file").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_empty_target_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    atomic.publish_directory(work(target), target)
    assert (target / "sub" / "file").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_existing_target_is_replaced_only_with_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        atomic.begin_directory(target, "one")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    atomic.publish_directory(work(target, overwrite=True), target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_exchange_swaps_two_names(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
        (path / path.name).touch()
    if not atomic._exchange(first, second):
        pytest.skip("this system has no such call")
    assert (first / "second").exists() and (second / "first").exists()
    with pytest.raises(FileNotFoundError):
        atomic._exchange(first, tmp_path / "nowhere")


def test_target_filled_during_the_work_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "result"
    directory = work(target)
    target.mkdir()
    (target / "theirs").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        atomic.publish_directory(directory, target)
    assert (target / "theirs").exists() and directory.exists()


def test_targets_that_cannot_be_replaced_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        atomic.begin_directory(tmp_path / "file", "one")
    with pytest.raises(CheckpointError, match="file/under: cannot be created"):
        atomic.begin_directory(tmp_path / "file" / "under", "one")
    with pytest.raises(CheckpointError, match="mount point"):
        atomic.begin_directory(Path("/"), "one", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds the working directory"):
        atomic.begin_directory(tmp_path, "one", overwrite=True)


def test_full_disk_message_names_leftovers_to_delete(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(CheckpointError, match=r"needs 1,0{3}.* bytes of disk, .*another disk"):
        atomic.begin_directory(target, "one", needed_bytes=10**18)
    left = work(target)
    with pytest.raises(CheckpointError, match=rf"delete {left}"):
        atomic.begin_directory(target, "two", needed_bytes=10**18)
    assert atomic.leftovers(target) == [left]
    atomic.discard_directory(left)
    assert list(tmp_path.iterdir()) == []


def test_directory_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        atomic, "fsync_path", lambda path: synced.append((path.name, target.exists()))
    )
    directory = work(target)
    atomic.publish_directory(directory, target)
    before = [("file", False), ("sub", False), (directory.name, False)]
    assert synced == [*before, (tmp_path.name, True)]


def test_source_inside_target_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "hf" / "meg"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"hf: holds the source .*hf/meg; name another"):
        atomic.check_apart(source, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"link: holds the source"):
        atomic.check_apart(source, tmp_path / "link")
    with pytest.raises(CheckpointError, match=r"meg: is the source itself"):
        atomic.check_apart(tmp_path / "link" / "meg", source)
    for apart in (source / "below", tmp_path / "hf" / "me", tmp_path / "other"):
        atomic.check_apart(source, apart)


def files(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in directory.iterdir()}


def test_file_is_replaced_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for text in ("first", "änderung\n"):
        atomic.write_text(path, text)
        assert files(tmp_path) == {"x": text}


def test_json_is_readable_text(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "x", {"é": [1, None]}, indent=None)
    assert files(tmp_path) == {"x": '{"é": [1, null]}\n'}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "x", float("nan"))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "x"
    atomic.write_text(path, "old")

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        atomic.write_text(path, "new")
    assert files(tmp_path) == {"x": "old"}


def test_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic.atomic_file(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert files(tmp_path) == {"x": "old"}


def test_leftover_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("first")
    temporary.write_text("left by a killed process")
    atomic.write_text(path, "second")
    assert files(tmp_path) == {"x": "second"}


def test_file_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def record(*arguments: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(*arguments)

        monkeypatch.setattr(os, name, record)
    atomic.write_text(tmp_path / "x", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_concurrent_writers_use_separate_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with (
        atomic.atomic_file(path, concurrent=True) as first,
        atomic.atomic_file(path, concurrent=True) as second,
    ):
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert files(tmp_path) == {"x": "first"}


def test_append_adds_flushed_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed = tmp_path / "x", []
    monkeypatch.setattr(os, "fsync", flushed.append)
    atomic.append_bytes(path, b"one\n")
    atomic.append_bytes(path, b"two\n", fsync=False)
    assert path.read_bytes() == b"one\ntwo\n" and len(flushed) == 1


def test_partly_written_record_is_an_error(tmp_path: Path) -> None:
    """The system accepts 4 of 10 bytes, as on a disk that becomes full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
        with pytest.raises(OSError, match="No space left on device"):
            atomic.append_bytes(tmp_path / "x", b"0123456789")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_truncate_cuts_and_leaves_a_file_of_the_right_size(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    atomic.truncate_file(path, 4)
    assert path.read_bytes() == b"0123"
    modified_ns = path.stat().st_mtime_ns
    atomic.truncate_file(path, 4)
    assert path.stat().st_mtime_ns == modified_ns
