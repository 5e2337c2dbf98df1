"""Packing: every pair once, no overfull row, few rows, equal work on all ranks."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.packing import plan as plan_module
from megatron_idpo.data.packing.plan import (
    ROW_OVERHEAD_TOKENS,
    attention_visits,
    coarse_trim_tokens,
    plan_rows,
    row_lengths,
    trimmed_length,
)
from megatron_idpo.data.pairs import pair_tokens

ROW_TOKENS = 64
lengths = st.lists(
    st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16)), min_size=1, max_size=60
).map(np.array)
REQUIRED_FILL = 0.97
LARGER_ROW_COUNTS = 3


@settings(max_examples=60)
@given(
    lengths,
    st.sampled_from([0, 1, 8, 24, 100]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_plan_has_every_pair_once_in_few_even_rows(lengths_B3, trim, shared, ranks, multiple):
    options = {"share_prompt": shared, "ranks": ranks, "multiple": multiple}
    plan = plan_rows(lengths_B3, row_tokens=ROW_TOKENS, trim_tokens=trim, **options)
    tokens_B = pair_tokens(lengths_B3, share_prompt=shared)
    rows = list(chain.from_iterable(plan.pairs))
    assert len(plan.pairs) == ranks
    assert len({len(rank) for rank in plan.pairs}) == 1
    assert len(plan.pairs[0]) >= 1 and len(plan.pairs[0]) % multiple == 0
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths_B3)))
    assert all(row == sorted(row) for row in rows)
    # The length is the smallest that holds the fullest row.
    fullest = max(int(tokens_B[row].sum()) for row in rows if row)
    trimmed = min(ROW_TOKENS, -(-fullest // trim) * trim) if trim else ROW_TOKENS
    assert plan.row_tokens == trimmed and fullest <= ROW_TOKENS
    # A row is empty only if no row has two pairs.
    assert all(rows) or max(map(len, rows)) == 1
    # Best fit decreasing needs at most 11/9 of the fewest rows, plus one, then rounded up.
    fewest = -(-int(tokens_B.sum()) // ROW_TOKENS)
    step = ranks * multiple
    num_long = int((2 * tokens_B > ROW_TOKENS).sum())
    bound = (11 * max(2 * fewest, num_long)) // 9 + 1
    assert len(rows) <= -(-bound // step) * step + (LARGER_ROW_COUNTS * step if trim else 0)
    # Trimming never costs more than full rows.
    whole = plan_rows(lengths_B3, row_tokens=ROW_TOKENS, **options)
    costs = [
        len(chosen.pairs[0]) * (chosen.row_tokens + ROW_OVERHEAD_TOKENS) for chosen in (plan, whole)
    ]
    assert costs[0] <= costs[1]


def plain_lengths(*tokens):
    """Pairs of these sizes; the split into parts does not matter."""
    return np.array([(total - 2, 1, 1) for total in tokens])


def test_swaps_fix_an_overfull_row():
    # Spreading gives 50+40 and 50+30+30; the last pair of 50 is swapped with the 40.
    plan = plan_rows(plain_lengths(50, 50, 40, 30, 30), row_tokens=100)
    assert sorted(plan.pairs[0]) == [[0, 1], [2, 3, 4]]


def test_fullest_row_is_leveled_although_it_fits():
    plan = plan_rows(plain_lengths(50, 50, 40, 30, 30), row_tokens=110, trim_tokens=1)
    assert plan.row_tokens == 100


def test_levelling_moves_pairs_into_rows_that_attention_made_dear():
    # The long pairs' attention costs more than all the short ones: spreading puts these apart.
    lengths_B3 = plain_lengths(32_000, 32_000, *[500] * 264)
    plan = plan_rows(lengths_B3, row_tokens=65_536, trim_tokens=500, ranks=2, multiple=2)
    assert [len(rank) for rank in plan.pairs] == [2, 2]
    assert plan.row_tokens == 49_000


def test_best_fit_is_used_if_swaps_fail():
    # Spreading gives 60+27+14 and 40+35+15, and no swap of two pairs helps.
    plan = plan_rows(plain_lengths(60, 40, 35, 27, 15, 14), row_tokens=100)
    assert sorted(plan.pairs[0]) == [[0, 1], [2, 3, 4, 5]]


def test_rounding_up_the_rows_spreads_the_pairs():
    plan = plan_rows(plain_lengths(*[10] * 8), row_tokens=100, ranks=2, multiple=2)
    assert [[len(row) for row in rank] for rank in plan.pairs] == [[2, 2], [2, 2]]


def test_best_fit_leaves_no_row_empty():
    # Spreading by attention overfills a row and swaps cannot fix it; best fit needs six rows.
    tokens = (69, 65, 64, 63, 54, 43, 43, 40, 25, 19, 18, 18, 17, 16, 10, 10, 6, 3)
    lengths_B3 = plain_lengths(*[10_000 * total for total in tokens])
    plan = plan_rows(lengths_B3, row_tokens=1_000_000, multiple=7)
    assert len(plan.pairs[0]) == 7 and all(plan.pairs[0])


def test_rows_beyond_the_number_of_pairs_are_empty():
    plan = plan_rows(plain_lengths(10, 10), row_tokens=100, ranks=2, multiple=4)
    assert [sum(map(len, rank)) for rank in plan.pairs] == [1, 1]
    assert [len(rank) for rank in plan.pairs] == [4, 4]


@pytest.mark.parametrize(
    ("num_pairs", "tokens", "rows", "row_tokens"),
    [
        # 2 rows of 11 pairs, 5632 positions; 3 rows of 7 save 256, more than a row costs.
        (21, 256, 3, 1792),
        # 2 rows of 17 pairs, 4352 positions; 3 rows of 11 save 128, just what a row costs.
        (33, 128, 2, 2176),
    ],
)
def test_one_more_row_must_save_its_overhead(num_pairs, tokens, rows, row_tokens):
    assert ROW_OVERHEAD_TOKENS == 128
    lengths_B3 = plain_lengths(*[tokens] * num_pairs)
    plan = plan_rows(lengths_B3, row_tokens=4096, trim_tokens=tokens)
    assert (len(plan.pairs[0]), plan.row_tokens) == (rows, row_tokens)


def test_impossible_row_counts_are_not_tried(monkeypatch):
    """Pairs longer than half a row need one row each; trying fewer took seconds for a thousand."""
    tried = []
    pack = plan_module._pack
    monkeypatch.setattr(plan_module, "_pack", lambda *args: tried.append(args[2]) or pack(*args))
    plan = plan_rows(plain_lengths(*[51] * 40), row_tokens=100, ranks=4)
    assert tried == [40] and len(plan.pairs[0]) == 10


def test_costliest_pairs_are_spread_first():
    plan = plan_rows(plain_lengths(10, 10, 20), row_tokens=40, ranks=2)
    assert sorted(plan.pairs) == [[[0, 1]], [[2]]]


def test_attention_cost_is_balanced_over_ranks():
    # Every pair has a row; the longer ones come first and have less attention.
    lengths_B3 = np.array([[20, 40, 40], [20, 40, 40], [97, 1, 1], [97, 1, 1]])
    plan = plan_rows(lengths_B3, row_tokens=100, ranks=2)
    # The ranks' n-th rows have similar cost.
    assert plan.pairs == [[[2], [0]], [[3], [1]]]


def test_next_row_goes_to_the_rank_with_least_attention():
    lengths_B3 = np.array([[98, 1, 1], [80, 10, 10], [60, 20, 20], [20, 40, 40]])
    plan = plan_rows(lengths_B3, row_tokens=100, ranks=2)
    assert plan.pairs == [[[0], [3]], [[1], [2]]]


def test_long_pairs_are_in_different_rows():
    lengths_B3 = np.array([[30_000, 500, 500], [30_000, 500, 500], *[[400, 50, 50]] * 40])
    plan = plan_rows(lengths_B3, row_tokens=65_536, trim_tokens=128, ranks=2)
    assert [len(rank) for rank in plan.pairs] == [1, 1]
    assert all(min(row) < 2 for rank in plan.pairs for row in rank)


@given(row_tokens=st.integers(1, 9000), trim_tokens=st.integers(0, 600))
def test_few_row_lengths_on_a_gpu(row_tokens, trim_tokens):
    coarse = coarse_trim_tokens(row_tokens, trim_tokens)
    lengths = row_lengths(row_tokens, coarse)
    assert len(lengths) <= 4 and lengths == sorted(set(lengths))
    used = {1, row_tokens, row_tokens // 2 + 1, row_tokens // 4, row_tokens // 4 + 1} - {0}
    for tokens in used:
        assert trimmed_length(tokens, row_tokens=row_tokens, trim_tokens=coarse) in lengths
    if trim_tokens:
        assert all(length % trim_tokens == 0 for length in lengths[:-1])


def test_attention_visits_are_causal():
    shared, plain = (
        int(attention_visits(np.array([[3, 2, 1]]), share_prompt=share)[0])
        for share in (True, False)
    )
    causal = [sum(range(1, n + 1)) for n in (3, 5, 4)]
    assert plain == causal[1] + causal[2]
    assert shared == causal[1] + causal[2] - causal[0]


@pytest.mark.parametrize("batch", [(32, 1), (64, 1), (512, 1), (64, 4), (512, 8)])
@pytest.mark.parametrize("medians", [(122, 27, 35), (52, 161, 93), (713, 99, 95)])
def test_rows_are_full(medians, batch):
    # The three datasets' medians, with a spread like theirs.
    random = np.random.default_rng(0)
    num_pairs, ranks = batch
    used = computed = 0
    for _ in range(8):
        drawn = random.lognormal(np.log(medians), 0.5, (num_pairs, 3)).astype(int)
        lengths_B3 = np.clip(drawn, 1, 1024)
        plan = plan_rows(lengths_B3, row_tokens=4096, trim_tokens=128, ranks=ranks)
        used += int(pair_tokens(lengths_B3, share_prompt=True).sum())
        computed += ranks * len(plan.pairs[0]) * plan.row_tokens
    assert used / computed >= REQUIRED_FILL


@given(lengths, st.sampled_from([0, 1, 8, 24, 100, 2000]))
def test_pairs_that_fit_into_one_row_are_in_one_row(lengths_B3, trim):
    """Losses of sorted values depend on it."""
    assert len(plan_rows(lengths_B3, row_tokens=60 * 48, trim_tokens=trim).pairs[0]) == 1
