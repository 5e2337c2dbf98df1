"""The output directory of a run: created, locked by one run at a time, unlocked."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError
from megatron_idpo.train.run_directory import RunDirectory

pytestmark = pytest.mark.distributed


def open_directory(root: Path, *, twice: bool = False) -> list[str]:
    """Files in the directory while it is open."""
    from megatron_idpo.train.run_directory import open_run_directory

    with open_run_directory(root) as directory:
        if twice:
            with open_run_directory(root):
                pass
        names = [str(directory.root), *sorted(os.listdir(directory.root))]
    return names


def test_directory_is_created_and_locked(workers, tmp_path):
    root = tmp_path / "deep" / "run"
    for _ in range(2):  # again after it is unlocked
        assert workers.run(open_directory, 2, root) == [[str(root), ".lock"]] * 2


def test_second_run_is_rejected(workers, tmp_path):
    with pytest.raises(ConfigError) as raised:
        workers.run(open_directory, 2, tmp_path / "run", twice=True)
    message = str(raised.value)
    assert f"training.output: {tmp_path / 'run'} is being written by another run" in message
    assert "name another directory" in message
    workers.run(open_directory, 2, tmp_path / "run")


def exit_code_of_a_restart(root: Path) -> int:
    """Of a run whose output is still held by a process of the run before."""
    from megatron_idpo.storage import lock
    from megatron_idpo.train import run_directory

    with (
        patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1"),
        patch.object(lock, "_LOST_HOLDER_S", 0.01),
        run_directory.open_run_directory(root),
    ):
        try:
            with run_directory.open_run_directory(root):
                return 0
        except ConfigError as error:
            assert "is being written by another run (host" in str(error)
            return error.exit_code


def test_output_held_by_a_lost_process_is_not_a_user_error(workers, tmp_path):
    """A scheduler starts the run again, on every rank."""
    assert workers.run(exit_code_of_a_restart, 2, tmp_path / "run") == [EXIT_PREEMPTED] * 2


def test_directory_that_cannot_be_written_is_reported(workers, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"training.output: {root} cannot be written"):
            workers.run(open_directory, 1, root)
    with pytest.raises(ConfigError, match="cannot be written"):
        workers.run(open_directory, 1, Path("/proc/run"))


def test_home_directory_is_expanded(workers, tmp_path, monkeypatch):
    (names,) = workers.run(open_at_home, 1, tmp_path)
    assert names[0] == str(tmp_path / "run")


def open_at_home(home: Path) -> list[str]:
    from unittest.mock import patch

    with patch.dict(os.environ, {"HOME": str(home)}):
        return open_directory(Path("~/run"))


def test_configuration_is_written_atomically(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_config("first")
    directory.write_config("second")
    assert directory.config.read_text() == "second"
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(ConfigError) as raised:
        directory.write_config("third")
    assert "config.yaml cannot be written: No space left" in str(raised.value)
    assert directory.config.read_text() == "second"


def _full(source: Path, target: Path) -> None:
    raise OSError(28, "No space left on device")
