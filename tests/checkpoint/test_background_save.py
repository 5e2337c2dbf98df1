"""Work beside the training step: the same end on all ranks, and nobody waits for a dead one."""

import threading
import time

import pytest

from megatron_idpo.errors import CheckpointError

pytestmark = pytest.mark.distributed


def in_order() -> list[bool]:
    """What `poll` says before, while and after a job that every rank ends at another time."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import Background

    background = Background()
    gate, said = threading.Event(), [background.poll(), background.wait(), background.is_running]
    for _ in range(2):
        background.start(gate.wait)
        said += [background.is_running, background.poll()]
        if dist.get_rank() == 1:
            gate.set()
        said.append(background.poll())
        gate.set()
        while not background.poll():
            time.sleep(0.001)
        said += [background.is_running, background.poll()]
        gate.clear()
    return said


def test_all_ranks_see_the_same_end(workers):
    one, other = workers.run(in_order, 2)
    assert one == other == [False] * 3 + [True, False, False, False, False] * 2


def collective_beside_the_jobs() -> float:
    """The job's collectives and the main thread's do not meet."""
    import torch
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import Background

    background, results = Background(), []

    def job() -> None:
        for number in range(50):
            tensor = torch.tensor(float(number))
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
    assert results == [2.0 * number for number in range(50)]
    return True


def test_collectives_do_not_meet(workers):
    assert workers.run(collective_beside_the_jobs, 2) == [True, True]


def failing(ask: str, kind: type[Exception]) -> list[str]:
    """The second rank's job fails; then another job runs."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.background_save import Background

    background, said = Background(), []

    def job() -> None:
        if dist.get_rank() == 1:
            raise kind("no room")

    background.start(job)
    try:
        while not getattr(background, ask)():
            pass
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    background.start(lambda: None)
    said.append(str(background.wait()))
    return said


@pytest.mark.parametrize("ask", ["poll", "wait"])
def test_a_failure_is_everyones(workers, ask):
    message = ["CheckpointError: no room", "True"]
    assert workers.run(failing, 2, ask, CheckpointError) == [message, message]


def test_a_mistake_of_ours_stays_what_it_is(workers):
    one, other = workers.run(failing, 2, "wait", ZeroDivisionError)
    assert other == ["ZeroDivisionError: no room", "True"]
    assert one == ["CheckpointError: no room", "True"]
