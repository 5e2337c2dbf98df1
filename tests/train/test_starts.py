"""The record of a run's starts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_idpo
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.starts import FILE, commit_of, read_starts, this_start, write_start


def test_resumed_run_keeps_its_first_start(tmp_path: Path) -> None:
    first = this_start(step=0, total_steps=9, processes=2)
    resumed = replace(first, step=4, time="2999-01-01T00:00:00+00:00")
    for start in (first, resumed):
        write_start(tmp_path, start)
    assert read_starts(tmp_path) == [first, resumed]


def test_run_that_starts_again_forgets_earlier_ones(tmp_path: Path) -> None:
    first = this_start(step=0, total_steps=9, processes=2)
    for start in (first, replace(first, step=4), replace(first, processes=1)):
        write_start(tmp_path, start)
    assert [start.processes for start in read_starts(tmp_path)] == [1]


def test_steps_of_sdpo_are_read_together(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"step-{number}").mkdir()
        start = this_start(step=0, total_steps=number, processes=1)
        write_start(tmp_path / f"step-{number}", replace(start, time=str(number)))
    assert [start.total_steps for start in read_starts(tmp_path)] == [1, 2]


def test_damaged_line_is_left_out(tmp_path: Path) -> None:
    write_start(tmp_path, this_start(step=0, total_steps=9, processes=2))
    with (tmp_path / FILE).open("a") as file:
        file.write('not json\n{"time": 1}\n{"time": "2026')
    assert len(read_starts(tmp_path)) == 1


def test_start_names_command_versions_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/env/bin/megatron-idpo", "train", "a b.yaml"])
    start = this_start(step=3, total_steps=9, processes=2)
    assert start.command == "megatron-idpo train 'a b.yaml'"
    assert start.versions["megatron-idpo"] == megatron_idpo.__version__
    assert {"python", "torch", "megatron-core"} <= set(start.versions) and start.device


def test_commit_is_that_of_the_checkout_which_tracks_the_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit_of(package) is None
    git("init", "-q")
    assert commit_of(package) is None, "an environment within another project's checkout"
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = commit_of(package)
    assert commit is not None and len(commit) >= 7 and not commit.endswith("+")
    (package / "__init__.py").write_text("changed = 1\n")
    assert commit_of(package) == f"{commit}+"


def test_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.output: cannot write .*starts\.jsonl"):
        write_start(tmp_path / "missing", this_start(step=0, total_steps=1, processes=1))
