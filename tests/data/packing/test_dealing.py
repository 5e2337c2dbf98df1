"""A row's positions are dealt to context-parallel ranks once each, with equal attention work."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.packing.dealing import block_tokens, deal_positions, keys_seen
from megatron_idpo.data.packing.plan import plan_rows

CHATS = Path(__file__).parents[3] / "examples" / "data" / "quickstart_train.jsonl"

MAX_OVER_MEAN = 1.05
"""Attention of the rank with the most over the mean."""


PARTS = ("prompt", "chosen", "rejected")


def row_of(lengths, row_tokens):
    """Spans of pairs with these lengths of prompt, chosen and rejected answer."""
    bounds = np.cumsum(np.array(lengths).ravel()).reshape(-1, 3)
    starts = np.concatenate([[0], bounds[:-1, 2]])
    assert bounds[-1, 2] <= row_tokens
    return np.column_stack([starts, bounds]).astype(np.int32)


def imbalance(spans, row_tokens, ranks, window=None):
    seen_T = keys_seen(spans, row_tokens)
    if window is not None:
        seen_T = np.minimum(seen_T, window)
    work_R = seen_T[deal_positions(spans, row_tokens, ranks)].sum(1)
    return work_R.max() / work_R.mean()


parts = st.tuples(*[st.integers(1, 40)] * 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(parts, max_size=6), st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 8]))
def test_every_position_is_dealt_once_and_evenly(lengths, padding, ranks):
    row_tokens = int(np.sum(lengths)) + padding + ranks
    row_tokens -= row_tokens % ranks
    spans = row_of(lengths, row_tokens) if lengths else np.zeros((0, 4), np.int32)
    spans = spans[spans[:, 3] <= row_tokens]
    positions_RL = deal_positions(spans, row_tokens, ranks)
    assert positions_RL.shape == (ranks, row_tokens // ranks)
    assert sorted(positions_RL.ravel()) == list(range(row_tokens))
    assert (np.diff(positions_RL, axis=1) > 0).all()
    assert np.array_equal(positions_RL, deal_positions(spans, row_tokens, ranks))
    # No assignment of whole blocks is off by more than the costliest block.
    block = block_tokens(row_tokens // ranks)
    seen_T = keys_seen(spans, row_tokens)
    work_R = seen_T[positions_RL].sum(1)
    assert work_R.max() - work_R.min() <= seen_T.reshape(-1, block).sum(1).max()


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("row_tokens", [2048, 4096, 16_384])
def test_rows_of_real_chats_are_balanced(row_tokens, ranks):
    records = map(json.loads, CHATS.read_text(encoding="utf-8").splitlines())
    lengths_B3 = np.array(
        [[len(record[part][0]["content"]) // 4 + 1 for part in PARTS] for record in records]
    )
    plan = plan_rows(lengths_B3, row_tokens=row_tokens, trim_tokens=128)
    for pairs in plan.pairs[0]:
        spans = row_of(lengths_B3[pairs], plan.row_tokens)
        for window in (None, 512):
            assert imbalance(spans, plan.row_tokens, ranks, window) <= MAX_OVER_MEAN


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize(
    "lengths", [(30_000, 1_384, 1_384), (8_000, 8_768, 16_000), (1_000, 1_000, 30_768)]
)
def test_a_pair_of_32k_tokens_is_balanced(lengths, window, ranks):
    assert imbalance(row_of([lengths], 32_768), 32_768, ranks, window) <= MAX_OVER_MEAN
