"""The shuffle: a permutation in each epoch, another one in the next, and no visible pattern."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.packing.epoch_order import stream_pairs


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(-5, 2**70), st.integers(0, 1000))
def test_every_epoch_holds_every_pair_once(num_pairs, seed, epoch):
    pairs = stream_pairs(epoch * num_pairs, num_pairs, num_pairs=num_pairs, seed=seed)
    assert sorted(pairs.tolist()) == list(range(num_pairs))


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 200), st.integers(1, 100), st.integers(1, 100))
def test_a_place_holds_the_same_pair_however_it_is_read(num_pairs, first, left, right):
    whole = stream_pairs(first, left + right, num_pairs=num_pairs, seed=7)
    parts = [
        stream_pairs(first, left, num_pairs=num_pairs, seed=7),
        stream_pairs(first + left, right, num_pairs=num_pairs, seed=7),
    ]
    assert whole.tolist() == np.concatenate(parts).tolist()


def test_the_order_of_a_seed_is_fixed_for_ever():
    # A changed order would make old checkpoints resume with the wrong pairs.
    order = stream_pairs(8, 12, num_pairs=10, seed=0).tolist()
    assert order == [6, 1, 4, 2, 0, 5, 9, 3, 8, 1, 7, 6]


def test_seeds_and_epochs_differ():
    orders = {
        tuple(stream_pairs(epoch * 100, 100, num_pairs=100, seed=seed))
        for epoch in range(5)
        for seed in range(5)
    }
    assert len(orders) == 25


def test_the_first_place_is_any_pair_equally_often():
    num_pairs, seeds = 50, 5000
    firsts = [int(stream_pairs(0, 1, num_pairs=num_pairs, seed=seed)[0]) for seed in range(seeds)]
    counts = np.bincount(firsts, minlength=num_pairs)
    chi_squared = ((counts - seeds / num_pairs) ** 2 / (seeds / num_pairs)).sum()
    assert chi_squared < 86  # 49 degrees of freedom: exceeded by chance once in 1000.


def test_neighbours_in_the_collection_are_no_neighbours_in_the_order():
    order = stream_pairs(0, 10_000, num_pairs=10_000, seed=1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # 4 standard errors
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected
