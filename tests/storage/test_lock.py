"""A lock file that one process at a time holds."""

import multiprocessing
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, OutputLockedError
from megatron_idpo.storage import lock
from megatron_idpo.storage.lock import (
    LockHeldError,
    lock_within,
    locked,
    locked_directory,
    this_process,
)

TIMEOUT_S = 10


def held_elsewhere(file: Path) -> bool:
    try:
        with locked(file):
            return False
    except LockHeldError:
        return True


def hold(file: Path, started: str) -> None:
    """Holds the lock until this process is killed."""
    with locked(file):
        Path(started).touch()
        time.sleep(600)


def test_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for _ in range(2):
        with locked(file):
            assert held_elsewhere(file)
        assert not held_elsewhere(file)
    with pytest.raises(ZeroDivisionError), locked(file):
        _ = 1 / 0
    assert not held_elsewhere(file)


def test_holder_on_another_machine_is_recognized_also_under_the_same_host_name(
    tmp_path: Path,
) -> None:
    """A pod that replaces one whose machine is lost has its host name."""

    def holder() -> LockHeldError:
        with pytest.raises(LockHeldError) as raised, locked(tmp_path / "lock"):
            pass
        assert raised.value.holder.startswith("host ") and "\n" not in raised.value.holder
        return raised.value

    with locked(tmp_path / "lock"):
        assert not holder().is_elsewhere
        with patch("megatron_idpo.storage.lock.boot_id", return_value="another"):
            assert holder().is_elsewhere
        with patch("socket.gethostname", return_value="another"):
            assert holder().is_elsewhere
    assert not LockHeldError("").is_elsewhere, "the holder has not written its name yet"


@pytest.mark.parametrize(
    ("restarts", "boot_id", "kind", "code"),
    [
        ("0", None, ConfigError, EXIT_USER_ERROR),
        ("1", None, OutputLockedError, EXIT_PREEMPTED),
        ("0", "another", OutputLockedError, EXIT_PREEMPTED),
    ],
)
def test_only_the_lock_of_a_process_that_may_be_lost_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: str,
    boot_id: str | None,
    kind: type[ConfigError],
    code: int,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.setattr(lock, "_LOST_HOLDER_S", 0.01)
    with locked(tmp_path / ".lock"):
        if boot_id is not None:
            monkeypatch.setattr(lock, "boot_id", lambda: boot_id)
        with (
            pytest.raises(ConfigError, match=r"reference\.cache: .* another run \(host ") as raised,
            locked_directory(tmp_path, "reference.cache"),
        ):
            pass
    assert type(raised.value) is kind and raised.value.exit_code == code


def test_lock_is_waited_for_until_the_limit(tmp_path: Path) -> None:
    file, now_s, reported = tmp_path / "lock", [0.0], list[str]()
    holder, waiter = ExitStack(), ExitStack()
    released_at_s = 5.0

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if now_s[0] >= released_at_s:
            holder.close()

    def wait(limit_s: float) -> None:
        lock_within(lambda: waiter.enter_context(locked(file)), lambda _: limit_s, reported.append)

    with patch("megatron_idpo.storage.lock.time") as clock, holder, waiter:
        clock.monotonic.side_effect, clock.sleep.side_effect = lambda: now_s[0], sleep
        holder.enter_context(locked(file))
        for limit_s in (0.0, 4.0):
            with pytest.raises(LockHeldError) as raised:
                wait(limit_s)
            assert raised.value.holder == this_process()
        assert reported == [this_process()], "said once, and only if there is something to wait for"
        wait(4.0)
        assert 5.0 <= now_s[0] <= 8.0 and held_elsewhere(file)


def test_lock_is_released_when_its_process_is_killed(tmp_path: Path) -> None:
    file, started = tmp_path / "lock", tmp_path / "there"
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(file, str(started)))
    process.start()
    until_s = time.monotonic() + 6 * TIMEOUT_S
    while not started.exists():
        assert time.monotonic() < until_s and process.is_alive()
        time.sleep(0.01)
    assert held_elsewhere(file)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with locked(file, wait=True):
        pass
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


def test_lock_is_released_although_a_child_inherited_the_descriptor(tmp_path: Path) -> None:
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


def test_os_errors_are_raised_and_leave_no_open_descriptor(tmp_path: Path) -> None:
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
