"""Pairs and their training order: a permutation per epoch, another in the next, no pattern."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.packing.batches import EvaluationBatches, RowSettings
from megatron_idpo.data.pairs import Pair, PairSource, stream_pairs


@settings(max_examples=30)
@given(st.integers(1, 3000), st.integers(-5, 2**70), st.integers(0, 1000))
def test_every_epoch_has_every_pair_once(num_pairs, seed, epoch):
    pairs = stream_pairs(epoch * num_pairs, num_pairs, num_pairs=num_pairs, seed=seed)
    assert sorted(pairs.tolist()) == list(range(num_pairs))


@settings(max_examples=30)
@given(st.integers(1, 50), st.integers(0, 200), st.integers(1, 100), st.integers(1, 100))
def test_order_does_not_depend_on_how_it_is_read(num_pairs, first, left, right):
    whole = stream_pairs(first, left + right, num_pairs=num_pairs, seed=7)
    parts = [
        stream_pairs(first, left, num_pairs=num_pairs, seed=7),
        stream_pairs(first + left, right, num_pairs=num_pairs, seed=7),
    ]
    assert whole.tolist() == np.concatenate(parts).tolist()


def test_order_of_a_seed_is_stable_across_versions():
    # A changed order would make old checkpoints resume with the wrong pairs.
    order = stream_pairs(8, 12, num_pairs=10, seed=0).tolist()
    assert order == [6, 1, 4, 2, 0, 5, 9, 3, 8, 1, 7, 6]


def test_seeds_and_epochs_have_different_orders():
    orders = {
        tuple(stream_pairs(epoch * 100, 100, num_pairs=100, seed=seed))
        for epoch in range(5)
        for seed in range(5)
    }
    assert len(orders) == 25


def test_first_pair_is_uniformly_distributed():
    num_pairs, seeds = 50, 5000
    firsts = [int(stream_pairs(0, 1, num_pairs=num_pairs, seed=seed)[0]) for seed in range(seeds)]
    counts = np.bincount(firsts, minlength=num_pairs)
    chi_squared = ((counts - seeds / num_pairs) ** 2 / (seeds / num_pairs)).sum()
    assert chi_squared < 86  # 49 degrees of freedom: exceeded by chance once in 1000.


def test_order_does_not_correlate_with_the_collection():
    order = stream_pairs(0, 10_000, num_pairs=10_000, seed=1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # 4 standard errors
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected


PAIRS = [
    Pair(index, *(np.full(length, index, np.int32) for length in (3, 2, 1))) for index in range(4)
]


class Collection:
    """A minimal `PairSource`: no base class, only lengths and access."""

    lengths_P3 = np.array([[3, 2, 1]] * len(PAIRS))

    def __len__(self) -> int:
        return len(PAIRS)

    def __getitem__(self, index: int, /) -> Pair:
        return PAIRS[index]


def test_pair_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        PAIRS[0].index = 1  # type: ignore[misc]
    assert not hasattr(PAIRS[0], "__dict__")


def test_pairs_are_compared_by_identity() -> None:
    # Comparing arrays would be ambiguous, and a pair has to be a key.
    alike = Pair(0, *(np.zeros(length, np.int32) for length in (3, 2, 1)))
    assert PAIRS[0] == PAIRS[0] and PAIRS[0] != alike
    assert len({*PAIRS, alike}) == len(PAIRS) + 1


def test_batches_need_only_lengths_and_access_of_a_collection() -> None:
    source: PairSource = Collection()
    settings = RowSettings(row_tokens=6, pad_token=9)
    batches = EvaluationBatches(source, settings, global_batch_pairs=len(PAIRS))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(row.tokens_T.tolist() for row in rows) == [[index] * 6 for index in range(4)]
    assert sorted(int(row.pair_index_P[0]) for row in rows) == [0, 1, 2, 3]
