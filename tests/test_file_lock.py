"""A file that one process at a time holds."""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_idpo.storage.lock import Held, locked

SOON_S = 10


def held_elsewhere(file: Path) -> bool:
    try:
        with locked(file):
            return False
    except Held:
        return True


def hold(file: Path, is_there: str) -> None:
    """In a process of its own: hold it until killed."""
    with locked(file):
        Path(is_there).touch()
        time.sleep(600)


def test_one_at_a_time_and_let_go_of(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for _ in range(2):
        with locked(file):
            assert held_elsewhere(file)
        assert not held_elsewhere(file)
    with pytest.raises(ZeroDivisionError), locked(file):
        _ = 1 / 0
    assert not held_elsewhere(file)


def test_it_ends_with_the_process(tmp_path: Path) -> None:
    """However that ends; and whoever waits for it goes on."""
    file, is_there = tmp_path / "lock", tmp_path / "there"
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(file, str(is_there)))
    process.start()
    until_s = time.monotonic() + 6 * SOON_S
    while not is_there.exists():
        assert time.monotonic() < until_s and process.is_alive()
        time.sleep(0.01)
    assert held_elsewhere(file)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with locked(file, wait=True):
        pass
    process.join(SOON_S)
    assert process.exitcode == -signal.SIGKILL


def test_a_child_that_has_the_descriptor_does_not_keep_it(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file):
        [descriptor] = [
            int(name)
            for name in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{name}") == str(file)
        ]
        os.set_inheritable(descriptor, True)
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        assert str(file) in map(os.path.realpath, Path(f"/proc/{child.pid}/fd").iterdir())
        assert not held_elsewhere(file)
    finally:
        child.kill()
        child.wait()


def test_what_the_system_refuses(tmp_path: Path) -> None:
    """Nothing stands in for the lock; no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), locked(tmp_path / "file" / "lock"):
        pass
    no_locks = OSError(38, "Function not implemented")
    with (
        patch("fcntl.flock", side_effect=no_locks),
        pytest.raises(OSError, match="not implemented"),
        locked(tmp_path / "other"),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
