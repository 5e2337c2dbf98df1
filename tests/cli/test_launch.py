"""`--processes N`: workers by torchrun's API, one message for an error of the user."""

import os
import re
from pathlib import Path
from typing import Any

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


def command_line(words: list[str], printed: str) -> int:
    """The exit code; what the program and its workers print goes to a file."""
    with open(printed, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    return cli.main(words)


@pytest.mark.distributed
def test_an_error_of_the_user_is_one_message(workers: Any, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    words = ["train", str(tmp_path / "run.yaml"), "lr=1", "--processes", "2"]
    printed = tmp_path / "printed"
    assert workers.run_as_program(command_line, 1, words, str(printed)) == [EXIT_USER_ERROR]
    (line,) = printed.read_text().splitlines()
    assert re.match(r"megatron-idpo: error \(rank [01]\): lr \(command line\): unknown", line)
