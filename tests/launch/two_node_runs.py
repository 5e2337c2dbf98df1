"""Runs of a tiny model on two machines, and what they must leave behind."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.train.tiny_run import Files, exported, write_config

from .two_nodes import Node, static_command, wait_until

EPOCHS = 20
STEPS = 4 * EPOCHS
HEARTBEAT_TIMEOUT_S = 10
START_S = 240.0
"""Until a run has ended, on a busy machine."""


def config(files: Files, output: Path, **data: Any) -> str:
    """A configuration that saves often; `data` changes that section."""
    return write_config(
        files,
        output,
        data=data,
        training={"epochs": EPOCHS, "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S},
        checkpoint={"every_steps": 10, "keep_last": 1000},
    )


def start(
    nodes: Sequence[Node], logs: Path, *words: str, **options: str
) -> list[subprocess.Popen[bytes]]:
    """Start `train` on each machine, with one process; prints to `LOGS/NAME.log`."""
    return [
        node.start(static_command(node, 1, *words), logs / f"{node.name}.log", **options)
        for node in nodes
    ]


def steps_logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def has_ended(started: Sequence[subprocess.Popen[bytes]]) -> bool:
    return any(machine.poll() is not None for machine in started)


def wait_for_steps(
    output: Path, steps: int, started: Sequence[subprocess.Popen[bytes]], log: Path
) -> None:
    """Wait until the run has logged so many steps; it must be running then."""
    wait_until(lambda: steps_logged(output) >= steps or has_ended(started), START_S)
    assert not has_ended(started), log.read_text()


def assert_same_weights(output: Path, expected: Path) -> None:
    ours, theirs = exported(output), exported(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
