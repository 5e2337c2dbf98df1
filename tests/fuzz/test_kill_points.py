"""A process killed at any file system call: a file or directory is the old one or the new one."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_idpo.storage import atomic
from megatron_idpo.storage.sealed import read_sealed, write_sealed
from megatron_idpo.testing import WorkerPool, write_tiny_hf_model

from .budget import count, inputs

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"}

OLD, NEW = {"value": "old" * 50}, {"value": "new" * 500}


def write_file(root: Path, values: dict[str, Any]) -> None:
    atomic.write_json(root / "x.json", values)


def read_file(root: Path) -> Any:
    return json.loads((root / "x.json").read_text())


def write_record(root: Path, values: dict[str, Any]) -> None:
    write_sealed(root / "sealed.json", values)


def read_record(root: Path) -> Any:
    return read_sealed(root / "sealed.json", remedy="restore it")


def write_directory(root: Path, values: dict[str, Any]) -> None:
    target = root / "d"
    atomic.clear_leftovers(target)
    directory = atomic.begin_directory(target, "token", overwrite=True)
    for name in ("a", "b"):
        (directory / name).write_text(json.dumps(values))
    atomic.publish_directory(directory, target, overwrite=True)


def read_directory(root: Path) -> Any:
    atomic.clear_leftovers(root / "d")
    first, second = (json.loads((root / "d" / name).read_text()) for name in ("a", "b"))
    assert first == second and os.listdir(root) == ["d"]
    return first


WRITERS: dict[str, tuple[Callable[..., None], Callable[[Path], Any]]] = {
    "file": (write_file, read_file),
    "record": (write_record, read_record),
    "directory": (write_directory, read_directory),
}


def killed_at(moment: int, write: Callable[..., None], root: Path) -> bool:
    """Writes NEW in a fork that kills itself at its `moment`-th call; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        remaining = [moment]

        def count_down(event: str, arguments: tuple[Any, ...]) -> None:
            if event in EVENTS and str(root) in str(arguments[:1]):
                if remaining[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                remaining[0] -= 1

        sys.addaudithook(count_down)
        try:
            write(root, NEW)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@inputs(10)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    moments=st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
@example(name="directory", moments=[3])
@example(name="directory", moments=[6, 2])
def test_old_or_new_content_after_kills(
    tmp_path_factory: pytest.TempPathFactory, name: str, moments: list[int]
) -> None:
    write, read = WRITERS[name]
    root = tmp_path_factory.mktemp("killed")
    write(root, OLD)
    is_new = False
    for moment in moments:
        is_new |= not killed_at(moment, write, root)
        content = read(root)
        assert content in (OLD, NEW) and not (is_new and content == OLD)
        is_new |= content == NEW
        count(f"kill points, {name}", "new" if content == NEW else "old")
    shutil.rmtree(root)


@pytest.mark.exhaustive  # half a minute; `make fuzz` runs it
@inputs(1)
@given(first=st.integers(0, 40))
def test_a_checkpoint_is_old_or_new_after_a_kill(
    tmp_path_factory: pytest.TempPathFactory, workers: WorkerPool, first: int
) -> None:
    from tests.checkpoint.crash_trials import crash_trials
    from tests.plugin import tiny_megatron

    root = tmp_path_factory.mktemp("checkpoints")
    model = write_tiny_hf_model(root / "model", "llama", **tiny_megatron.SIZES)
    arguments = (str(model), root / "trials", "next", first, 7, 6)
    (trials,) = workers.run_as_program(crash_trials, 1, *arguments, timeout_s=300)
    for trial in trials:
        assert trial["values"] == [trial["step"]] and trial["step"] in (2, 3), trial
        count("kill points, checkpoint", f"step {trial['step']}")
