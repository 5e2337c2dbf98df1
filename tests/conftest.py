"""A pool of CPU workers, shared by all tests so that each worker starts once."""

from collections.abc import Iterator

import pytest

from megatron_idpo.testing import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Worker processes for `workers.run(function, world_size, ...)`, started on demand."""
    with WorkerPool() as pool:
        yield pool
