"""Background jobs: all ranks see the same outcome, and no rank waits for a failed one."""

import threading
import time

import pytest

from megatron_idpo.errors import CheckpointError

pytestmark = pytest.mark.distributed


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
