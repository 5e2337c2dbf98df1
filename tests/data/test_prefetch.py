"""Prefetching keeps order, stays bounded, passes errors on and leaves no thread behind."""

import threading
import time

import pytest

from megatron_idpo.data.packing.prefetch import prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [1, 3])
def test_items_come_in_order_and_the_thread_ends(ahead):
    assert list(prefetch(range(100), ahead)) == list(range(100))
    assert not prefetch_threads()


def test_no_more_is_made_ahead_than_asked_for():
    made = []

    def items():
        for item in range(100):
            made.append(item)
            yield item

    ahead = prefetch(items(), 3)
    next(ahead)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    ahead.close()
    assert made == [0, 1, 2, 3]
    assert not prefetch_threads()


def test_an_error_comes_in_the_place_of_its_item():
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    ahead = prefetch(items(), 5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(ahead)
    assert not prefetch_threads()


def test_none_is_an_item_like_any_other():
    assert list(prefetch([None, None], 1)) == [None, None]
