"""Background jobs: all ranks see the same outcome, and no rank waits for a failed one."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from megatron_idpo.checkpoint import background_save
from megatron_idpo.errors import EXIT_PEER_LOST, CheckpointError, ConfigError

pytestmark = pytest.mark.distributed

LAZY = "TORCH_GLOO_LAZY_INIT"


def in_order() -> list[bool]:
    """Results of `poll` before, during and after a job that ends at different times."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    background = BackgroundWorker()
    gate, results = threading.Event(), [background.poll(), background.wait(), background.is_running]
    for _ in range(2):
        background.start(gate.wait)
        results += [background.is_running, background.poll()]
        if dist.get_rank() == 1:
            gate.set()
        results.append(background.poll())
        gate.set()
        while not background.poll():
            time.sleep(0.001)
        results += [background.is_running, background.poll()]
        gate.clear()
    return results


def test_all_ranks_see_the_end_at_the_same_poll(workers):
    first, second = workers.run(in_order, 2)
    assert first == second == [False] * 3 + [True, False, False, False, False] * 2


def collectives_on_both_threads() -> bool:
    """Collectives of the job and of the main thread at the same time."""
    import torch
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    background, results = BackgroundWorker(), []

    def job() -> None:
        for index in range(50):
            tensor = torch.tensor(float(index))
            dist.all_reduce(tensor, group=background.group)
            results.append(float(tensor))

    background.start(job)
    for _ in range(50):
        ones = torch.ones(3)
        dist.all_reduce(ones)
        assert ones.tolist() == [2.0] * 3
        if background.poll():
            break
    background.wait()
    assert results == [2.0 * index for index in range(50)]
    return True


def test_collectives_of_job_and_training_are_separate(workers):
    assert workers.run(collectives_on_both_threads, 2) == [True, True]


def failing(ask: str, kind: type[Exception]) -> list[str]:
    """The second rank's job fails; then another job runs."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    background, outcome = BackgroundWorker(), []

    def job() -> None:
        if dist.get_rank() == 1:
            raise kind("no space")

    background.start(job)
    try:
        while not getattr(background, ask)():
            pass
    except Exception as error:
        outcome.append(f"{type(error).__name__}: {error}")
    background.start(lambda: None)
    outcome.append(str(background.wait()))
    return outcome


@pytest.mark.parametrize("ask", ["poll", "wait"])
def test_failure_is_raised_on_all_ranks(workers, ask):
    message = ["CheckpointError: no space", "True"]
    assert workers.run(failing, 2, ask, CheckpointError) == [message, message]


def test_internal_error_keeps_its_type_on_its_rank(workers):
    first, second = workers.run(failing, 2, "wait", ZeroDivisionError)
    assert second == ["ZeroDivisionError: no space", "True"]
    assert first == ["CheckpointError: no space", "True"]


def failing_on_one_rank(code: int) -> int:
    """The exit code of the error on this rank when the first rank's job fails with another one."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    def job() -> None:
        if dist.get_rank() == 0:
            error = CheckpointError("the storage fails")
            error.exit_code = code
            raise error

    background = BackgroundWorker()
    background.start(job)
    with pytest.raises(CheckpointError) as raised:
        background.wait()
    return raised.value.exit_code


def test_failure_has_its_exit_code_on_all_ranks(workers):
    assert workers.run(failing_on_one_rank, 2, EXIT_PEER_LOST) == [EXIT_PEER_LOST] * 2


def test_ranks_that_cannot_connect_are_reported_at_the_start(monkeypatch):
    """Training over NCCL would notice it at the first save only."""
    reason = "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 120000 ms\n more"
    barrier = Mock(side_effect=RuntimeError(reason))
    monkeypatch.setattr("torch.distributed.monitored_barrier", barrier)
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME: .*Rank 1 failed") as raised:
        background_save._check_connections(Mock())
    assert raised.value.exit_code == EXIT_PEER_LOST and "more" not in str(raised.value)


def laziness_of_groups() -> tuple[str | None, str | None]:
    """The variable while the group is created, and afterwards."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import BackgroundWorker

    found: list[str | None] = []
    create = dist.new_group

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append(os.environ.get(LAZY))
        return create(*args, **kwargs)

    with patch.object(dist, "new_group", recorded):
        BackgroundWorker()
    return found[0], os.environ.get(LAZY)


def test_group_connects_lazily(workers):
    assert workers.run(laziness_of_groups, 1) == [("1", None)]


@pytest.mark.exhaustive  # a process that imports everything
def test_ranks_connect_to_the_first_and_to_few_others(tmp_path):
    ranks = 16
    script = Path(__file__).with_name("lazy_connections.py")
    ran = subprocess.run(
        [sys.executable, script, str(ranks), tmp_path / "rendezvous"],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    *others, first = sorted(map(int, ran.stdout.split()))
    assert first >= ranks - 1 and max(others) <= 8
