"""`--processes N`: workers by torchrun's API, one message for an error of the user."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.cli import launch as launcher
from megatron_idpo.cli import main as cli
from megatron_idpo.cli.errors import EXIT_INTERRUPTED
from megatron_idpo.cli.launch import without_option
from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR

from ..train.tiny_run import LORA, write_config, write_files

CONFIG = """model: {path: missing/model}
data: {train: missing.jsonl}
optimizer: {lr: 1e-4}
training: {output: run}
"""

WORKER = """
import os, signal, sys, time
from pathlib import Path
saved = Path(sys.argv[1]) / f"saved-{os.environ['RANK']}"
saves = sys.argv[2] == "saves"
if saves:
    signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), os._exit(75)))
elif sys.argv[2] == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
saved.with_name(f"ready-{os.environ['RANK']}").touch()
time.sleep(60)
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
        (
            "judge a.yaml --processes 2",
            "--processes: unknown option; see `megatron-idpo judge --help`",
        ),
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


def signals(numbers: list[int], ready: list[Path]) -> None:
    """Sends this process the signals, each when the workers are there."""
    while not all(path.exists() for path in ready):
        time.sleep(0.02)
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.3)


def stopped(numbers: list[int], mode: str, directory: Path) -> tuple[int, bool]:
    """The exit code, and whether the handlers of signals are what they were before."""
    launcher.WORKER = ("-c", WORKER, str(directory), mode)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    ready = [directory / f"ready-{rank}" for rank in range(2)]
    thread = threading.Thread(target=signals, args=(numbers, ready), daemon=True)
    thread.start()
    code = command_line(["train", "run.yaml", "--processes", "2"], str(directory / "printed"))
    thread.join()
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return code, after == handlers


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("numbers", "mode", "code"),
    [
        ([signal.SIGTERM], "saves", EXIT_PREEMPTED),
        ([signal.SIGINT], "saves", EXIT_PREEMPTED),
        ([signal.SIGINT], "ends", EXIT_INTERRUPTED),
        ([signal.SIGINT, signal.SIGINT], "hangs", EXIT_INTERRUPTED),
    ],
)
def test_a_signal_stops_all_workers_after_a_save(
    workers: Any, numbers: list[int], mode: str, code: int, tmp_path: Path
):
    """In a separate process, to which the signals are sent."""
    arguments = ([int(number) for number in numbers], mode, tmp_path)
    assert workers.run_as_program(stopped, 1, *arguments) == [(code, True)]
    assert len(list(tmp_path.glob("saved-*"))) == (2 if mode == "saves" else 0)
    lines = (tmp_path / "printed").read_text().splitlines()
    assert len(lines) == (1 if code == EXIT_INTERRUPTED else 0), lines


@pytest.mark.distributed
@pytest.mark.exhaustive  # with workers that train nothing: the test above
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_one_message(tmp_path: Path, number: int):
    files = write_files(tmp_path)
    file = write_config(
        files,
        tmp_path / "run",
        lora=LORA,
        training={"epochs": 5000, "start_check": False},
        reference={"source": "adapter_off"},
    )
    command = [sys.executable, "-m", "megatron_idpo", "train", file, "--processes", "2"]
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(100) == EXIT_PREEMPTED
    assert log.read_text().count("stopped by a signal after step") == 1
    assert "Traceback" not in log.read_text()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
