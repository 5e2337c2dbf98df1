"""A map over worker processes that keeps order and holds only a few items at a time.

`multiprocessing.Pool.imap` and `ProcessPoolExecutor.map` take all of their input at once, so memory
grows with it. Here a window of items is in flight. Processes are spawned (forking a process that
has CUDA or communication threads is not safe), which costs seconds: the first items are done in
this process, and a small input never starts any.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any

_IN_FLIGHT_PER_WORKER = 3

_context: Any = None  # Only ever set in a worker process, by its initializer.


def ordered_map[Context, Item, Result](
    function: Callable[[Context, Item], Result],
    context: Context,
    items: Iterator[Item],
    *,
    num_workers: int,
    first_here: int,
) -> Generator[Result]:
    """Yields `function(context, item)` for each item, in order.

    Args:
        function: importable by name.
        context: picklable; sent to each worker once.
        items: picklable; read lazily.
        num_workers: below 2, everything happens in this process.
        first_here: how many items to do in this process before workers are started.
    """
    here = items if num_workers < 2 else islice(items, first_here)
    for item in here:
        yield function(context, item)
    following = next(items, None) if num_workers >= 2 else None
    if following is None:
        return
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), _start_worker, (context,)
    )
    try:
        window: deque[Future[Result]] = deque([pool.submit(_work, function, following)])
        for item in items:
            if len(window) >= _IN_FLIGHT_PER_WORKER * num_workers:
                yield window.popleft().result()
            window.append(pool.submit(_work, function, item))
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def _start_worker(context: Any) -> None:
    global _context
    # One thread each: the processes share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _context = context


def _work(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_context, item)
