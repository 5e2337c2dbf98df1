"""Directories that appear whole or not at all."""

from pathlib import Path

import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage import directories as atomic


def work(target: Path, token: str = "one", *, overwrite: bool = False, text: str = "new") -> Path:
    directory = atomic.begin(target, token, overwrite=overwrite)
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_text(text)
    return directory


def test_a_directory_appears_only_when_published(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "result"
    directory = work(target)
    assert not target.exists() and atomic.leftovers(target) == [directory]
    atomic.publish(directory, target)
    assert (target / "sub" / "file").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_target_is_used(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    atomic.publish(work(target), target)
    assert (target / "sub" / "file").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_an_existing_target_is_replaced_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        atomic.begin(target, "one")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    atomic.publish(work(target, overwrite=True), target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / path.name).touch()
    if not atomic._exchange(one, other):
        pytest.skip("this system has no such call")
    assert (one / "other").exists() and (other / "one").exists()
    with pytest.raises(FileNotFoundError):
        atomic._exchange(one, tmp_path / "nowhere")


def test_a_target_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "result"
    directory = work(target)
    target.mkdir()
    (target / "theirs").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        atomic.publish(directory, target)
    assert (target / "theirs").exists() and directory.exists()


def test_targets_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        atomic.begin(tmp_path / "file", "one")
    with pytest.raises(CheckpointError, match="file/under: cannot be created"):
        atomic.begin(tmp_path / "file" / "under", "one")
    with pytest.raises(CheckpointError, match="mount point"):
        atomic.begin(Path("/"), "one", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds the working directory"):
        atomic.begin(tmp_path, "one", overwrite=True)


def test_too_little_space_names_what_could_be_deleted(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(CheckpointError, match=r"needs 1,0{3}.* bytes of disk, .*another disk"):
        atomic.begin(target, "one", needed_bytes=10**18)
    left = work(target)
    with pytest.raises(CheckpointError, match=rf"delete {left}"):
        atomic.begin(target, "two", needed_bytes=10**18)
    assert atomic.leftovers(target) == [left]
    atomic.discard(left)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(atomic, "_sync", lambda path: synced.append((path.name, target.exists())))
    directory = work(target)
    atomic.publish(directory, target)
    before = [("file", False), ("sub", False), (directory.name, False)]
    assert synced == [*before, (tmp_path.name, True)]


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
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
