"""`--processes N`: workers by torchrun's API, one message for an error of the user."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idpo.cli import main as cli
from megatron_idpo.cli.launch import without_option
from megatron_idpo.errors import EXIT_USER_ERROR

CONFIG = """model: {path: missing/model}
data: {train: missing.jsonl}
optimizer: {lr: 1e-4}
training: {output: run}
"""


def test_workers_get_the_other_words():
    words = ["train", "a.yaml", "--processes", "2", "layout.tensor=2"]
    assert without_option(words) == ["train", "a.yaml", "layout.tensor=2"]
    assert without_option(["score", "--processes=2", "a.yaml"]) == ["score", "a.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train a.yaml --processes 0", "cannot use '0'; give a number from 1"),
        ("train a.yaml --processes two", "cannot use 'two'"),
        ("judge a.yaml --processes 2", "unrecognized arguments: --processes"),
    ],
)
def test_an_invalid_number_is_refused(words, message, capsys):
    assert cli.main(words.split()) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_under_torchrun_it_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", "a.yaml", "--processes", "2"]) == EXIT_USER_ERROR
    assert "leave it out under torchrun" in capsys.readouterr().err


@pytest.mark.distributed
def test_an_error_of_the_user_is_one_message(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "megatron_idpo", "train", "run.yaml", "lr=1"]
    done = subprocess.run(
        [*command, "--processes", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == EXIT_USER_ERROR
    (line,) = done.stderr.splitlines()
    assert re.match(r"megatron-idpo: error \(rank [01]\): lr \(command line\): unknown", line)
