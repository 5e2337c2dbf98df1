"""Pools of workers, shared by all tests so that each worker starts once."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from megatron_idpo.testing import WorkerPool
from megatron_idpo.testing.phantom_gpu import why_not


def pytest_configure() -> None:
    """Give each of the test processes that run side by side its share of the CPU cores.

    Ranks that wait for each other run faster on one core than on two that another test process uses
    too: waking a process on another core costs more than switching to it (docs/decisions.md).
    """
    name = os.environ.get("PYTEST_XDIST_WORKER")  # "gw0", "gw1", ...
    if name is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    first = int(name.removeprefix("gw")) * share
    if share:
        os.sched_setaffinity(0, cores[first : first + share])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with several ranks first: the last files, which decide when all end, are short."""
    slow = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in slow)


class PhantomScheduling(LoadFileScheduling):
    """`--dist loadfile`, with all tests on phantom GPUs in one process: each would start a pool."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/phantom_gpu" if "/phantom_gpu/" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Replaces the scheduler of `make test`."""
    if config.getoption("dist") != "loadfile":
        return None
    return PhantomScheduling(config, log)


def pytest_collection_finish() -> None:
    """Exclude the tests and imported modules from garbage collection: it would visit them often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Worker processes for `workers.run(function, world_size, ...)`, started on demand."""
    with WorkerPool() as pool:
        yield pool
        # Closing ends a worker as any program; the others are killed, which takes no time.
        pool._discard(pool._workers[1:])
        pids = [worker.process.pid for worker in pool._workers]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture(scope="session")
def has_phantom_gpu() -> None:
    """Skips where the CUDA path cannot be executed; in CI that is a failure."""
    if (reason := why_not()) is not None:
        if os.environ.get("CI"):
            pytest.fail(f"the CUDA path is not tested: {reason}")
        pytest.skip(f"no phantom GPU: {reason}")


@pytest.fixture(scope="session")
def gpu_workers(has_phantom_gpu: None) -> Iterator[WorkerPool]:
    """Like `workers`, on phantom GPUs: for tests that run on both devices."""
    with WorkerPool(max_workers=2, device="phantom") as pool:
        yield pool
