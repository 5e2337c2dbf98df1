"""`WorkerPool`: results, reuse of workers, crashes, hangs and invalid arguments."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_idpo.testing import WorkerError, run_distributed

pytestmark = pytest.mark.distributed

HANG_TIMEOUT_S = 1.5
"""More than a worker takes to enter the function on a loaded machine."""


@dataclass
class Argument:
    """Defined in the test module, which the worker can import only by path."""

    value: int


def rank_and_sum(argument, factor=1):
    rank = torch.distributed.get_rank()
    assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == str(rank)
    assert os.environ["WORLD_SIZE"] == str(torch.distributed.get_world_size())
    total = torch.tensor([argument.value * factor + rank])
    torch.distributed.all_reduce(total)
    return os.getpid(), rank, total, Argument(rank)


def process_id():
    return os.getpid()


def die_on_rank(dying_rank, exit_code):
    if torch.distributed.get_rank() == dying_rank:
        if exit_code is None:
            faulthandler._sigsegv()
        os._exit(exit_code)
    torch.distributed.barrier()


def hang():
    time.sleep(1000)


def wait_for_the_end(pid):
    """Until the fork server has reaped the process."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            time.sleep(0.01)


def test_results_are_in_rank_order_and_workers_are_reused(workers):
    first = workers.run(rank_and_sum, 2, Argument(3), factor=10)
    assert [rank for _, rank, *_ in first] == [0, 1]
    assert [total.tolist() for _, _, total, _ in first] == [[61], [61]]
    assert [returned for *_, returned in first] == [Argument(0), Argument(1)]
    second = workers.run(rank_and_sum, 2, Argument(0))
    assert [pid for pid, *_ in first] == [pid for pid, *_ in second]
    assert workers.run(process_id, 1) == [first[0][0]]


def test_replaced_workers_are_other_processes(workers):
    before = workers.run(process_id, 2)
    workers.replace_workers()
    assert not set(before) & set(workers.run(process_id, 2))


def run_program(num_ranks):
    """Joins the other ranks; their sum of pids, and what it started with."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.world import distributed_world

    start = (dist.is_initialized(), threading.active_count(), "RANK" in os.environ)
    with distributed_world() as world:
        assert world.size == num_ranks
        pids = [None] * world.size
        dist.all_gather_object(pids, os.getpid())
    return world.rank, sum(pids), start


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_program_is_a_new_process_that_joins_the_others(workers, num_ranks):
    reused = workers.run(process_id, 2)
    first, second = (workers.run_as_program(run_program, num_ranks, num_ranks) for _ in range(2))
    for result in (first, second):
        assert [rank for rank, *_ in result] == list(range(num_ranks))
        assert {start for *_, start in result} == {(False, 1, num_ranks > 1)}
    assert first[0][1] != second[0][1]
    assert workers.run(process_id, 2) == reused


def test_error_of_a_program_is_raised(workers):
    with pytest.raises(WorkerError, match=r"rank 1 of 2 died \(exit code 3\)"):
        workers.run_as_program(exit_on_rank, 2, 1, 3)


def exit_on_rank(rank, exit_code):
    if os.environ["RANK"] == str(rank):
        os._exit(exit_code)


def test_larger_world_starts_the_missing_workers(workers):
    workers.run(process_id, 1)
    assert len({*workers.run(process_id, 3)}) == 3


def test_dead_worker_is_reported_and_replaced(workers):
    before = workers.run(process_id, 2)
    with pytest.raises(WorkerError, match=r"rank 1 of 2 died \(exit code 3\)"):
        workers.run(die_on_rank, 2, 1, 3)
    # The other worker is kept; a worker may also die between two calls.
    os.kill(before[0], signal.SIGKILL)
    wait_for_the_end(before[0])
    after = workers.run(process_id, 2)
    assert not {*before} & {*after}


def test_crash_is_reported_with_its_stack(workers):
    with pytest.raises(WorkerError, match=r"killed by SIGSEGV(.|\n)*in die_on_rank"):
        workers.run(die_on_rank, 1, 0, None)


def test_hang_is_reported_with_its_stack_after_the_timeout(workers):
    workers.run(process_id, 1)
    with pytest.raises(WorkerError, match=r"rank 0 of 1 hung(.|\n)*in hang"):
        workers.run(hang, 1, timeout_s=HANG_TIMEOUT_S)


def test_functions_without_importable_name_are_rejected(workers):
    def local():
        pass

    for function in (local, lambda: None):
        with pytest.raises(TypeError, match="not a module-level function"):
            workers.run(function, 1)


@pytest.mark.parametrize("world_size", [0, 9])
def test_world_size_is_bounded(workers, world_size):
    with pytest.raises(ValueError, match="world_size must be 1 to 8"):
        workers.run(process_id, world_size)


def test_package_does_not_import_torch():
    # Nor the worker's module: `python -m` warns if it is imported already.
    heavy = "{'torch', 'megatron_idpo.testing.worker'}"
    program = f"import megatron_idpo.testing, sys; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.exhaustive  # imports everything; `workers` checks the same when it is closed
def test_run_distributed_ends_its_process():
    (pid,) = run_distributed(process_id, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_ends_with_its_killed_parent():
    """As a worker with the fork server, which here is a program that only forks."""
    program = (
        "import os, time; from megatron_idpo.testing.fork_server import end_with_parent\n"
        "parent = os.getpid()\n"
        "if (pid := os.fork()) == 0:\n"
        "    end_with_parent(parent); os.write(1, b'ready '); time.sleep(99)\n"
        "os.write(1, b'%d\\n' % pid); time.sleep(99)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    words = b""
    while not (b"ready" in words and b"\n" in words):
        words += os.read(parent.stdout.fileno(), 100)
    parent.kill()
    parent.wait()
    wait_for_the_end(int(words.replace(b"ready ", b"")))


@pytest.mark.parametrize(
    "victim",
    ["pool", pytest.param("server", marks=pytest.mark.exhaustive)],  # the test above
)
def test_no_worker_outlives_a_killed_pool(tmp_path, victim):
    """Not even one that hangs, and so never reads the end of its pipe."""
    pids = tmp_path / "pids"
    program = str(Path(__file__).with_name("light_pool.py"))
    pool = subprocess.Popen([sys.executable, program, pids, "2"], stderr=subprocess.PIPE, text=True)
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert pool.poll() is None
        time.sleep(0.05)
    if victim == "server":
        server = Path(f"/proc/{pids.read_text().split()[0]}/stat").read_text().split()[3]
        os.kill(int(server), signal.SIGKILL)
        for pid in pids.read_text().split():
            wait_for_the_end(int(pid))
    pool.kill()
    _, stderr = pool.communicate()
    for pid in pids.read_text().split():
        wait_for_the_end(int(pid))
    assert victim == "server" or stderr == ""
