"""A run whose processes die, stop or fill the disk at random ends as if nothing had happened."""

import os
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from megatron_idpo.errors import UserError
from megatron_idpo.testing import WorkerError

from .run_hooks import after_call
from .test_loop_resume import losses, weights_bytes
from .tiny_run import LORA, run, write_config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.exhaustive,
]  # minutes; parts are in the normal run

FAULTS = 20
PROCESSES = 2
TIMEOUT_S = 600.0
FULL_BYTES = 1000
"""Files may not become larger on a full disk: less than a checkpoint has."""


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
            else:
                number = signal.SIGKILL if self.kind == "killed" else signal.SIGSTOP
                os.kill(os.getpid(), number)

        try:
            with after_call("train.logging.report:Report", "step", inject):
                yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def train(file: str, *hooks: Any) -> int:
    """A run as a program, so that it exchanges heartbeats; its exit code."""
    return run(file, *hooks).code


def test_random_faults_and_restarts_change_no_bit(tiny, workers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {
        "lora": {**LORA, "dropout": 0.1},
        "training": {"epochs": 20, "heartbeat_timeout_s": 10},
        "checkpoint": {"every_steps": 1},
    }
    workers.run(run, PROCESSES, write_config(tiny, whole, **settings), timeout_s=TIMEOUT_S)
    file = write_config(tiny, parts, **settings)
    random, kinds = Random(7), Counter[str]()
    for _ in range(FAULTS):
        kind = random.choice(["killed", "stopped", "disk full"])
        fault = Fault(kind, random.randrange(PROCESSES), random.randint(1, 3))
        with pytest.raises((WorkerError, UserError)) as failed:
            workers.run_as_program(train, PROCESSES, file, fault, timeout_s=TIMEOUT_S)
        if kind == "stopped":
            assert f"rank {1 - fault.rank} of 2 died (exit code 3)" in str(failed.value)
        kinds[kind] += 1
    assert len(kinds) == 3, kinds
    assert workers.run_as_program(train, PROCESSES, file, timeout_s=TIMEOUT_S) == [0, 0]
    assert weights_bytes(parts) == weights_bytes(whole)
    assert losses(parts) == losses(whole)
