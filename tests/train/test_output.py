"""A run's directory: made, held by one run at a time, let go of."""

import os
from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.train.run_directory import RunDirectory

pytestmark = pytest.mark.distributed


def open_it(root: Path, *, twice: bool = False) -> list[str]:
    """What is there while the directory is open, and after."""
    from megatron_idpo.train.run_directory import opened

    with opened(root) as directory:
        if twice:
            with opened(root):
                pass
        found = [str(directory.root), *sorted(os.listdir(directory.root))]
    return found


def test_it_is_made_and_held(workers, tmp_path):
    root = tmp_path / "deep" / "run"
    for _ in range(2):  # again, once it is let go of
        assert workers.run(open_it, 2, root) == [[str(root), ".lock"]] * 2


def test_one_run_at_a_time(workers, tmp_path):
    with pytest.raises(ConfigError) as raised:
        workers.run(open_it, 2, tmp_path / "run", twice=True)
    message = str(raised.value)
    assert f"training.output: {tmp_path / 'run'} is being written by another run" in message
    assert "name another directory" in message
    workers.run(open_it, 2, tmp_path / "run")


def test_what_cannot_be_made_or_written(workers, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"training.output: {root} cannot be written"):
            workers.run(open_it, 1, root)
    with pytest.raises(ConfigError, match="cannot be written"):
        workers.run(open_it, 1, Path("/proc/run"))


def test_a_home_directory_is_found(workers, tmp_path, monkeypatch):
    (found,) = workers.run(open_at_home, 1, tmp_path)
    assert found[0] == str(tmp_path / "run")


def open_at_home(home: Path) -> list[str]:
    from unittest.mock import patch

    with patch.dict(os.environ, {"HOME": str(home)}):
        return open_it(Path("~/run"))


def test_where_things_lie(tmp_path):
    directory = RunDirectory(tmp_path)
    locations = (
        directory.config,
        directory.metrics,
        directory.curves,
        directory.checkpoints,
        directory.hf,
        directory.adapter,
    )
    names = ["config.yaml", "metrics.jsonl", "curves.png", "checkpoints", "hf", "adapter"]
    assert [path.relative_to(tmp_path).as_posix() for path in locations] == names


def test_the_configuration_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_config("first")
    directory.write_config("second")
    assert directory.config.read_text() == "second"
    monkeypatch.setattr(Path, "replace", _full)
    with pytest.raises(ConfigError) as raised:
        directory.write_config("third")
    assert "config.yaml cannot be written: No space left" in str(raised.value)
    assert directory.config.read_text() == "second"


def _full(self: Path, target: Path) -> None:
    raise OSError(28, "No space left on device")
