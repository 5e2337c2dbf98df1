"""An ordered map that holds few items."""

import os
from collections.abc import Iterator

import pytest

from megatron_idpo.data.tokenize.process_map import ordered_map


def plus(context: int, item: int) -> tuple[int, int]:
    if item == 13:
        raise ValueError("unlucky")
    return context + item, os.getpid()


class Counted:
    """Counts how many items were taken."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0

    def __iter__(self) -> Iterator[int]:
        for item in range(self.size):
            self.taken += 1
            yield item


def test_one_worker_is_this_process_and_reads_one_item_at_a_time() -> None:
    counted = Counted(1000)
    results = ordered_map(plus, 5, iter(counted), num_workers=1, first_here=0)
    assert next(results) == (5, os.getpid()) and counted.taken == 1


def test_workers_keep_order_and_a_window_and_raise_what_they_meet() -> None:
    counted = Counted(1000)
    results = ordered_map(plus, 5, iter(counted), num_workers=2, first_here=2)
    taken = [next(results) for _ in range(5)]
    assert [value for value, _ in taken] == [5, 6, 7, 8, 9]
    assert [pid == os.getpid() for _, pid in taken] == [True, True, False, False, False]
    assert counted.taken < 20
    with pytest.raises(ValueError, match="unlucky"):
        list(results)


def test_a_small_input_starts_no_worker() -> None:
    results = ordered_map(plus, 0, iter(range(3)), num_workers=8, first_here=3)
    assert {pid for _, pid in results} == {os.getpid()}
