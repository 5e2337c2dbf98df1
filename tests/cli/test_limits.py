"""Limits of the process that are too low, and failures that the system causes."""

import errno
import resource
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from megatron_idpo.cli import limits
from megatron_idpo.cli import main as cli
from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, ConfigError


def printed_under(limit: str, *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of a verb in a shell with a limit."""
    command = f'ulimit {limit} && exec "$0" -m megatron_idpo "$@"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, *words], capture_output=True, text=True
    )
    assert not done.stdout
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("-n 20", "ulimit -n: is 20: too few open files, 256 are needed; raise the limit of open"),
        ("-v 2000000", "ulimit -v: is 2000000 KiB: too little memory, the libraries alone reserve"),
    ],
)
def test_a_low_limit_is_one_line_before_anything_is_loaded(limit, message):
    code, lines = printed_under(limit, "doctor")
    assert (code, len(lines)) == (EXIT_USER_ERROR, 1) and message in lines[0]


@pytest.fixture
def process_limits(monkeypatch):
    """Replaces the limits of this process; returns what they are set to."""
    values = {resource.RLIMIT_NOFILE: (1024, 65536), resource.RLIMIT_AS: (-1, -1)}
    monkeypatch.setattr(limits.resource, "getrlimit", values.__getitem__)
    monkeypatch.setattr(limits.resource, "setrlimit", values.__setitem__)
    return values


def test_the_soft_limit_of_open_files_is_raised(process_limits):
    limits.check_limits()
    assert process_limits[resource.RLIMIT_NOFILE] == (4096, 65536)
    process_limits[resource.RLIMIT_NOFILE] = (64, 300)
    limits.check_limits()
    assert process_limits[resource.RLIMIT_NOFILE] == (300, 300)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


LIMITED = {
    "no files": (
        OSError(errno.EMFILE, "Too many open files", "x"),
        "x: Too many open files; raise",
    ),
    "no space": (OSError(errno.ENOSPC, "No space", "x"), "x: No space left on device; free some"),
    "no rights": (PermissionError(errno.EACCES, "no", "x"), "x: Permission denied; change the"),
    "memory": (MemoryError(), "system: not enough memory (MemoryError); raise the limit of memory"),
    "torch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "system: not enough memory ([enforce fail] DefaultCPUAllocator",
    ),
    "linker": (
        ImportError("libx.so: failed to map segment from shared object"),
        "system: not enough memory (libx.so",
    ),
    "import": (ImportError("libx.so: Too many open files"), "system: not enough open files (libx"),
    "GPU": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 "
            "GiB of which 1.2 GiB is free. Process 1 has 77.9 GiB memory in use."
        ),
        "GPU memory: is full: Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB "
        "of which 1.2 GiB is free; lower data.row_tokens, set training.recompute to full, or raise "
        "layout.tensor",
    ),
    "cause": (
        raised(RuntimeError("x"), OSError(errno.EMFILE, "no")),
        "system: Too many open files",
    ),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_that_is_reached_is_one_line(name, monkeypatch, capsys):
    error, message = LIMITED[name]

    def fail(path, overrides):
        raise error

    monkeypatch.setattr("megatron_idpo.cli.train.main", fail)
    assert cli.main(["train", "x.yaml"]) == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-idpo: error: {message}")


def test_storage_of_one_machine_that_fails_can_be_cured_by_a_restart(monkeypatch, capsys):
    monkeypatch.setattr("megatron_idpo.cli.train.main", Mock(side_effect=OSError(errno.EIO, "x")))
    assert cli.main(["train", "x.yaml"]) == EXIT_PEER_LOST
    assert "the storage fails" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOENT, "no"), RuntimeError("y")])
def test_other_errors_keep_their_traceback(error, monkeypatch):
    def fail(path, overrides):
        raise error

    monkeypatch.setattr("megatron_idpo.cli.train.main", fail)
    with pytest.raises(type(error)):
        cli.main(["train", "x.yaml"])


def test_limits_that_suffice(process_limits):
    process_limits[resource.RLIMIT_AS] = (1 << 40, 1 << 40)
    limits.check_limits()
    process_limits[resource.RLIMIT_AS] = (1 << 30, 1 << 40)
    with pytest.raises(ConfigError, match="ulimit -v: is 1048576 KiB"):
        limits.check_limits()
