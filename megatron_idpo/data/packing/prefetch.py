"""Making things ahead of time on a background thread, a bounded number of them.

Batches are built while the accelerator works on the one before. A failure while building reaches
whoever asks for the next item, and closing the generator ends the thread before it returns, so that
no thread outlives the loop that used it.
"""

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue


def prefetch[Item](items: Iterable[Item], ahead: int) -> Generator[Item, None, None]:
    """Yield `items` in order, up to `ahead` (1 or more) of them made in advance.

    The thread starts with the first `next` and ends with the generator: when it is exhausted, when
    an error passes through, or at `close()`, which waits for the item being made at that moment.

    Raises:
        Whatever making an item raises, in the place of that item.
    """
    assert ahead >= 1, ahead
    ready: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(ahead)
    stopped = threading.Event()

    def make() -> None:
        try:
            iterator = iter(items)
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                try:
                    item = next(iterator)
                except StopIteration:
                    ready.put(None)
                    return
                ready.put((item,))
        except BaseException as error:
            ready.put(error)

    maker = threading.Thread(target=make, name="prefetch", daemon=True)
    maker.start()
    try:
        while (made := ready.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            room.release()
            yield made[0]
    finally:
        stopped.set()
        room.release()
        maker.join()
