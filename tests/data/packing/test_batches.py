"""Global batches: every pair once per epoch, on any number of ranks, resumable anywhere."""

import gc
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.packing.batches import (
    EvaluationBatches,
    RowSettings,
    TrainingBatches,
    prefetch,
)
from megatron_idpo.data.pairs import Pair
from megatron_idpo.errors import CheckpointError, DataError

ROWS = RowSettings(row_tokens=96, pad_token=0)


class RandomPairs:
    """Pairs of seeded random lengths; every token is the pair's index."""

    def __init__(self, num_pairs, longest=16, seed=0):
        random = np.random.default_rng(seed)
        self.lengths_P3 = random.integers(1, longest + 1, (num_pairs, 3), dtype=np.int32)

    def __len__(self):
        return len(self.lengths_P3)

    def __getitem__(self, index):
        return Pair(index, *(np.full(length, index, np.int32) for length in self.lengths_P3[index]))


def pairs_of(batches_of_ranks):
    """The pairs of one global batch, from the batch of every rank."""
    return sorted(
        int(pair) for batch in batches_of_ranks for row in batch.rows for pair in row.pair_index_P
    )


def run(pairs, rows=ROWS, consumed_pairs=0, **options):
    """All global batches of a run, each as a tuple with one batch for every rank."""
    ranks = []
    for rank in range(rows.data_size):
        batches = TrainingBatches(pairs, replace(rows, data_rank=rank), **options)
        batches.load_state_dict(batches.state_dict() | {"consumed_pairs": consumed_pairs})
        ranks.append(list(batches))
    return list(zip(*ranks, strict=True))


some_run = st.fixed_dictionaries(
    {
        "num_pairs": st.integers(1, 40),
        "size": st.integers(1, 12),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 2**40),
        "ranks": st.integers(1, 3),
        "multiple": st.integers(1, 3),
        "trim": st.sampled_from([0, 8, 11, 128]),
        "shared": st.booleans(),
    }
).filter(lambda case: case["num_pairs"] * case["epochs"] >= case["size"])


@settings(max_examples=30)
@given(some_run)
def test_every_pair_is_used_once_per_epoch_on_equal_ranks(case):
    rows = replace(
        ROWS,
        data_size=case["ranks"],
        rows_multiple=case["multiple"],
        trim_tokens=case["trim"],
        share_prompt=case["shared"],
    )
    pairs = RandomPairs(case["num_pairs"])
    options = {"global_batch_pairs": case["size"], "epochs": case["epochs"], "seed": case["seed"]}
    steps = run(pairs, rows, **options)

    seen = Counter()
    for step in steps:
        assert len(pairs_of(step)) == case["size"]
        seen.update(pairs_of(step))
        assert step[0].row_tokens <= ROWS.row_tokens
        for batch in step:
            assert batch.num_pairs == case["size"]
            assert len(batch.rows) == len(step[0].rows)
            assert len(batch.rows) % case["multiple"] == 0
            assert all(len(row.tokens_T) == step[0].row_tokens for row in batch.rows)
        assert step[0].used_tokens == sum(row.used_tokens for b in step for row in b.rows)
        assert step[0].computed_tokens == sum(len(row.tokens_T) for b in step for row in b.rows)
    dropped = case["epochs"] * case["num_pairs"] % case["size"]
    assert seen.total() == case["epochs"] * case["num_pairs"] - dropped
    assert all(count <= case["epochs"] for count in seen.values())
    if not dropped:
        assert set(seen.values()) == {case["epochs"]}
    batches = TrainingBatches(pairs, rows, **options)
    assert batches.remaining_batches == len(steps)
    assert batches.dropped_pairs == dropped


@settings(max_examples=15)
@given(some_run, st.integers(1, 3), st.data())
def test_resume_continues_with_the_next_pair_on_any_number_of_ranks(case, other_ranks, data):
    pairs = RandomPairs(case["num_pairs"])
    options = {"global_batch_pairs": case["size"], "epochs": case["epochs"], "seed": case["seed"]}
    whole = run(pairs, replace(ROWS, data_size=case["ranks"]), **options)
    done = data.draw(st.integers(0, len(whole)))
    rest = run(pairs, replace(ROWS, data_size=other_ranks), done * case["size"], **options)
    assert [pairs_of(step) for step in rest] == [pairs_of(step) for step in whole[done:]]


def test_state_counts_yielded_batches_not_prefetched_ones():
    pairs = RandomPairs(50)
    options = {"global_batch_pairs": 5, "seed": 3, "epochs": 2}
    whole = [row for batch in TrainingBatches(pairs, ROWS, **options) for row in batch.rows]
    first = TrainingBatches(pairs, ROWS, prefetch_batches=6, **options)
    rows = []
    for batch in first:
        rows += batch.rows
        if first.consumed_pairs == 35:
            break
    assert first.epoch == 0.7
    assert first.remaining_batches == 13
    second = TrainingBatches(pairs, ROWS, **options)
    second.load_state_dict(first.state_dict())
    rows += [row for batch in second for row in batch.rows]
    assert second.remaining_batches == 0
    assert [row.tokens_T.tolist() for row in rows] == [row.tokens_T.tolist() for row in whole]


def test_batch_can_contain_two_epochs():
    steps = run(RandomPairs(10), global_batch_pairs=4, epochs=2, seed=0)
    assert len(steps) == 5
    first_epoch = pairs_of(steps[0]) + pairs_of(steps[1])
    assert len(set(first_epoch)) == 8
    assert set(range(10)) - set(first_epoch) <= set(pairs_of(steps[2]))


def test_rows_are_trimmed_to_one_length():
    trimmed = run(
        RandomPairs(8, longest=4),
        replace(ROWS, data_size=2, trim_tokens=8),
        global_batch_pairs=8,
        seed=0,
    )
    ((left, right),) = trimmed
    assert left.row_tokens == right.row_tokens < ROWS.row_tokens
    assert left.row_tokens % 8 == 0
    fullest = max(row.used_tokens for batch in (left, right) for row in batch.rows)
    assert left.row_tokens - fullest < 8


def test_trim_tokens_0_keeps_the_row_length():
    ((batch,),) = run(
        RandomPairs(8, longest=4), replace(ROWS, trim_tokens=0), global_batch_pairs=8, seed=0
    )
    assert batch.row_tokens == ROWS.row_tokens


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_uses_every_pair_once_in_order(ranks):
    pairs = RandomPairs(23)
    of_ranks = [
        EvaluationBatches(
            pairs, replace(ROWS, data_size=ranks, data_rank=rank), global_batch_pairs=5
        )
        for rank in range(ranks)
    ]
    for _ in range(2):
        steps = list(zip(*of_ranks, strict=True))
        assert len(steps) == len(of_ranks[0]) == 5
        assert [step[0].num_pairs for step in steps] == [5, 5, 5, 5, 3]
        assert [pair for step in steps for pair in pairs_of(step)] == list(range(23))
        chosen_tokens = [batch.chosen_tokens for step in steps for batch in step]
        expected = [pairs.lengths_P3[first : first + 5, 1].sum() for first in range(0, 23, 5)]
        assert chosen_tokens == [count for count in expected for _ in range(ranks)]
        assert steps[-1][0].mean_chosen_tokens == expected[-1] / 3
        assert all(len(batch.rows) == len(step[0].rows) for step in steps for batch in step)


def test_invalid_pairs_are_refused_before_the_first_batch():
    with pytest.raises(DataError, match="no pairs left"):
        TrainingBatches(RandomPairs(0), ROWS, global_batch_pairs=1, seed=0)
    with pytest.raises(
        DataError, match=r"global_batch_pairs: one batch needs 21 .* 2 x 10.*at most 20"
    ):
        TrainingBatches(RandomPairs(10), ROWS, global_batch_pairs=21, epochs=2, seed=0)
    long = RandomPairs(10)
    long.lengths_P3[7] = 40
    with pytest.raises(DataError, match="pair 7: up to 120 positions"):
        TrainingBatches(long, ROWS, global_batch_pairs=2, seed=0)
    with pytest.raises(DataError, match="pair 7"):
        EvaluationBatches(long, ROWS, global_batch_pairs=2)


def test_state_of_another_order_is_refused():
    state = TrainingBatches(RandomPairs(10), ROWS, global_batch_pairs=2, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="seed of the data: 0 in the checkpoint, 1 in this"):
        TrainingBatches(RandomPairs(10), ROWS, global_batch_pairs=2, seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="num_pairs"):
        TrainingBatches(RandomPairs(11), ROWS, global_batch_pairs=2, seed=0).load_state_dict(state)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


class BrokenPairs(RandomPairs):
    """A collection with an unreadable pair."""

    def __getitem__(self, index):
        if index == 13:
            raise OSError("unreadable")
        return super().__getitem__(index)


def test_error_in_a_pair_is_raised_and_leaving_the_loop_ends_the_thread():
    with pytest.raises(OSError, match="unreadable"):
        list(TrainingBatches(BrokenPairs(20), ROWS, global_batch_pairs=4, seed=0))
    for _ in TrainingBatches(RandomPairs(100), ROWS, global_batch_pairs=4, seed=0):
        break
    gc.collect()
    assert not prefetch_threads()


def test_memory_is_independent_of_the_number_of_pairs():
    class Endless:
        """Two million pairs in one broadcast array."""

        lengths_P3 = np.broadcast_to(np.array([9, 8, 7], np.int32), (2_000_000, 3))

        def __len__(self):
            return len(self.lengths_P3)

        def __getitem__(self, index):
            return Pair(index, *(np.ones(n, np.int32) for n in (9, 8, 7)))

    batches = TrainingBatches(Endless(), ROWS, global_batch_pairs=64, seed=0)
    tracemalloc.start()
    peaks = []
    for step, _ in enumerate(batches):
        if step in (10, 40):
            peaks.append(tracemalloc.get_traced_memory()[1])
        if step == 40:
            break
    tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 30 batches of rows are 0.6 MB.
    assert peaks[1] < 5_000_000  # an index of the pairs would be 16 MB.


def test_trim_rows_separately_has_the_same_pairs_in_fewer_positions():
    pairs, trim = RandomPairs(40, longest=20), 8
    equal = replace(ROWS, trim_tokens=trim, data_size=2)
    own = replace(equal, trim_rows_separately=True)
    for equal_steps, separate in zip(
        run(pairs, equal, global_batch_pairs=9, seed=1),
        run(pairs, own, global_batch_pairs=9, seed=1),
        strict=True,
    ):
        assert pairs_of(separate) == pairs_of(equal_steps)
        for here, there in zip(separate, equal_steps, strict=True):
            assert [row.num_pairs for row in here.rows] == [row.num_pairs for row in there.rows]
            for row in here.rows:
                assert len(row.tokens_T) == max(1, -(-row.used_tokens // trim)) * trim
            assert here.row_tokens == max(len(row.tokens_T) for row in here.rows)
            assert here.row_tokens <= there.row_tokens
        positions = sum(len(row.tokens_T) for batch in separate for row in batch.rows)
        assert {batch.computed_tokens for batch in separate} == {positions}
        assert positions <= equal_steps[0].computed_tokens


def test_empty_row_has_the_smallest_length_when_trimmed_separately():
    pairs = RandomPairs(3)
    rows = replace(ROWS, trim_tokens=8, data_size=4, trim_rows_separately=True)
    (ranks,) = run(pairs, rows, global_batch_pairs=3, seed=0)
    empty = [row for batch in ranks for row in batch.rows if not row.num_pairs]
    assert empty and {len(row.tokens_T) for row in empty} == {8}


@pytest.mark.parametrize("ahead", [1, 3])
def test_prefetch_keeps_order_and_ends_its_thread(ahead):
    assert list(prefetch(range(100), ahead)) == list(range(100))
    assert not prefetch_threads()


def test_prefetch_is_bounded():
    computed, third_started = [], threading.Event()

    def items():
        for item in range(100):
            computed.append(item)
            if item == 3:
                third_started.set()
            yield item

    ahead = prefetch(items(), 3)
    next(ahead)
    # The first item was taken, three more may be computed; closing waits for the thread.
    assert third_started.wait(timeout=5)
    ahead.close()
    assert computed == [0, 1, 2, 3]
    assert not prefetch_threads()


def test_prefetch_raises_in_the_place_of_the_failed_item():
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    ahead = prefetch(items(), 5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(ahead)
    assert not prefetch_threads()


def test_prefetch_yields_none():
    assert list(prefetch([None, None], 1)) == [None, None]
