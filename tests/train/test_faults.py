"""Twenty random faults in one run, each followed by a restart, change no bit of its result.

Each of the two ranks has a network namespace to itself, where namespaces are possible, so that the
cable between them can be cut.
"""

import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_idpo.errors import EXIT_PEER_LOST, UserError
from megatron_idpo.testing import WorkerError
from tests.launch.two_nodes import Node, two_nodes, why_not

from .run_hooks import after_call
from .test_loop_resume import losses, weights_bytes
from .tiny_run import LORA, run, write_config

pytestmark = pytest.mark.distributed

FAULTS = 20
EPOCHS = 16
"""Of 4 steps: more than the faults leave of the run."""

PROCESSES = 2
TIMEOUT_S = 120.0
"""For one start; a fault is noticed within 15 s."""

FULL_BYTES = 1000
"""Files may not become larger on a full disk: less than a checkpoint has."""

KINDS = ("killed", "stopped", "disk full", *(() if why_not() else ("cable cut",)))
ENDED = {
    "killed": [r"rank {lost} of 2 died \(killed by SIGKILL\)"],
    "stopped": [r"rank {survivor} of 2 died \(exit code 3\)"],
    "cable cut": [r"rank 0 of 2 died \(exit code 3\)", r"rank 1 of 2 died \(exit code 3\)"],
    "disk full": ["File too large; raise the limit of file sizes"],
}
"""What the pool reports."""


@dataclass(frozen=True)
class Machine:
    """The namespace that a rank enters."""

    rank: int
    namespace: str
    interface: str
    address: str

    @classmethod
    def of(cls, node: Node) -> "Machine":
        return cls(node.rank, node.namespace, node.interface, node.address)

    def enter(self, first: "Machine") -> None:
        """Move this process, which has a single thread, to this machine's network."""
        with open(f"/var/run/netns/{self.namespace}") as namespace:
            os.setns(namespace.fileno(), os.CLONE_NEWNET)
        os.environ |= {"MASTER_ADDR": first.address, "GLOO_SOCKET_IFNAME": self.interface}
        os.environ["GROUP_RANK"] = str(self.rank)  # of torchrun: which machine this is


@dataclass(frozen=True)
class Fault:
    """What happens to a rank after some steps of this start."""

    kind: str
    rank: int
    after_steps: int

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        import torch.distributed as dist

        steps = 0
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def inject(*_: Any, **__: Any) -> None:
            nonlocal steps
            steps += 1
            if steps != self.after_steps or dist.get_rank() != self.rank:
                return
            if self.kind == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, limits[1]))
            elif self.kind == "cable cut":
                interface = os.environ["GLOO_SOCKET_IFNAME"]
                subprocess.run(["ip", "link", "set", interface, "down"], check=True)
            else:
                number = signal.SIGKILL if self.kind == "killed" else signal.SIGSTOP
                os.kill(os.getpid(), number)

        try:
            with after_call("train.logging.report:Report", "step", inject):
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def train(file: str, machines: Sequence[Machine], *hooks: Any) -> int:
    """A run as a program, so that it exchanges heartbeats; its exit code."""
    if machines:
        machines[int(os.environ["RANK"])].enter(machines[0])
    return run(file, *hooks).code


def random_faults() -> list[Fault]:
    """Each kind five times or more, in random order."""
    random = Random(7)
    kinds = [KINDS[index % len(KINDS)] for index in range(FAULTS)]
    random.shuffle(kinds)
    return [Fault(kind, random.randrange(PROCESSES), random.randint(1, 3)) for kind in kinds]


def train_verb(file: str, directory: str, fault: Fault) -> None:
    """The program; its exit code and what it prints are files of its rank."""
    from megatron_idpo.cli.main import main

    own = Path(directory) / os.environ["RANK"]
    os.dup2(os.open(own.with_suffix(".err"), os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = open(2, "w", closefd=False)
    with fault({}):
        own.with_suffix(".code").write_text(str(main(["train", file])))


def test_a_killed_process_is_named_by_the_other_one(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", training={"export": False})
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        fault = Fault("killed", rank=1, after_steps=2)
        workers.run_as_program(train_verb, 2, file, str(tmp_path), fault, timeout_s=TIMEOUT_S)
    assert (tmp_path / "0.code").read_text() == str(EXIT_PEER_LOST)
    message = (tmp_path / "0.err").read_text()
    assert re.search(r"rank 1 \(host .*\) is lost: its process has ended", message)


@pytest.mark.exhaustive  # five minutes
def test_random_faults_and_restarts_change_no_bit(tiny, workers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {
        "lora": {**LORA, "dropout": 0.1},
        "training": {"epochs": EPOCHS, "heartbeat_timeout_s": 10},
        "checkpoint": {"every_steps": 1},
    }
    workers.run(run, PROCESSES, write_config(tiny, whole, **settings), timeout_s=TIMEOUT_S)
    file, kinds = write_config(tiny, parts, **settings), Counter[str]()
    with nullcontext(()) if why_not() else two_nodes() as nodes:
        machines = [Machine.of(node) for node in nodes]

        def start(*hooks: Fault) -> list[int]:
            return workers.run_as_program(
                train, PROCESSES, file, machines, *hooks, timeout_s=TIMEOUT_S
            )

        for fault in random_faults():
            with pytest.raises((WorkerError, UserError)) as failed:
                start(fault)
            for node in nodes:
                node.cable("up")
            for expected in ENDED[fault.kind]:
                message = expected.format(lost=fault.rank, survivor=1 - fault.rank)
                assert re.search(message, str(failed.value)), fault
            kinds[fault.kind] += 1
        assert set(kinds) == set(KINDS) and start() == [0, 0]
    assert weights_bytes(parts) == weights_bytes(whole)
    assert losses(parts) == losses(whole)
