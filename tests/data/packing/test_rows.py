"""Rows: every response token is predicted from exactly the tokens before it in its sequence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.data.packing.rows import Row, check_lengths
from megatron_idpo.data.pairs import Pair, pair_tokens
from megatron_idpo.errors import DataError

PAD_TOKEN = 999
answer = st.lists(st.integers(0, 50), min_size=1, max_size=9)
some_pairs = st.lists(st.tuples(answer, answer, answer), max_size=6)


def make_pairs(token_lists, first_index=100):
    return [
        Pair(first_index + offset, *(np.array(tokens, np.int32) for tokens in parts))
        for offset, parts in enumerate(token_lists)
    ]


def context_positions(row, position):
    """Row positions that `position` attends to, by the definition of the spans."""
    for b0, b1, b2, b3 in row.spans_G4.tolist():
        if b0 <= position < b1:
            return list(range(b0, position + 1))
        if b1 <= position < b2:
            return list(range(b0, position + 1))
        if b2 <= position < b3:
            return [*range(b0, b1), *range(b2, position + 1)]
    raise AssertionError(f"{position} is padding")


@settings(max_examples=40)
@given(some_pairs, st.booleans(), st.integers(0, 20))
def test_every_response_token_is_predicted_from_its_own_sequence(token_lists, shared, padding):
    pairs = make_pairs(token_lists)
    used = sum((1 if shared else 2) * len(p) + len(c) + len(r) for p, c, r in token_lists)
    row = Row.build(pairs, max(1, used + padding), PAD_TOKEN, share_prompt=shared)

    scored = zip(row.target_positions_N, row.target_tokens_N, row.target_sequences_N, strict=True)
    expected = [
        (prompt + answer[:at], token, 2 * pair + side)
        for pair, (prompt, *answers) in enumerate(token_lists)
        for side, answer in enumerate(answers)
        for at, token in enumerate(answer)
    ]
    seen = []
    for position, token, sequence in scored:
        context = context_positions(row, position)
        assert row.position_ids_T[context].tolist() == list(range(len(context)))
        seen.append((row.tokens_T[context].tolist(), token, sequence))
    assert seen == expected
    assert row.pair_index_P.tolist() == [pair.index for pair in pairs]
    assert row.num_pairs == len(pairs)


@settings(max_examples=40)
@given(some_pairs, st.booleans(), st.integers(0, 20))
def test_groups_are_disjoint_and_the_rest_is_padding(token_lists, shared, padding):
    used = sum((1 if shared else 2) * len(p) + len(c) + len(r) for p, c, r in token_lists)
    row = Row.build(make_pairs(token_lists), used + padding + 1, PAD_TOKEN, share_prompt=shared)

    assert (np.diff(row.spans_G4.astype(int), axis=1) >= 0).all()
    assert (row.spans_G4[1:, 0] >= row.spans_G4[:-1, 3]).all()
    assert len(row.spans_G4) == len(token_lists) * (1 if shared else 2)
    assert row.used_tokens == used
    inside = np.zeros(used + padding + 1, bool)
    for b0, _, _, b3 in row.spans_G4:
        inside[b0:b3] = True
    assert inside.sum() == used
    assert (row.tokens_T[~inside] == PAD_TOKEN).all()
    assert (row.position_ids_T[~inside] == 0).all()


def test_documented_example():
    pair = make_pairs([([1, 2, 3], [4, 5, 6], [7, 8])])
    shared = Row.build(pair, 10, PAD_TOKEN)
    assert shared.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, PAD_TOKEN, PAD_TOKEN]
    assert shared.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0, 0]
    assert shared.spans_G4.tolist() == [[0, 3, 6, 8]]
    assert shared.target_positions_N.tolist() == [2, 3, 4, 2, 6]
    assert shared.target_tokens_N.tolist() == [4, 5, 6, 7, 8]
    assert shared.target_sequences_N.tolist() == [0, 0, 0, 1, 1]

    plain = Row.build(pair, 11, PAD_TOKEN, share_prompt=False)
    assert plain.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8]
    assert plain.spans_G4.tolist() == [[0, 6, 6, 6], [6, 11, 11, 11]]
    assert plain.target_positions_N.tolist() == [2, 3, 4, 8, 9]


def test_empty_row_has_no_targets():
    row = Row.empty(7, PAD_TOKEN)
    assert row.tokens_T.tolist() == [PAD_TOKEN] * 7
    assert row.spans_G4.shape == (0, 4)
    assert row.num_pairs == row.used_tokens == len(row.target_tokens_N) == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([], [1], [2]), r"pair 42: the prompt is empty.*BOS"),
        (([1], [], [2]), r"pair 42: the chosen answer is empty"),
        (([1], [2], []), r"pair 42: the rejected answer is empty"),
        (([1] * 5, [2] * 4, [3] * 3), r"pair 42: up to 12 positions needed, a row has 8;.*12"),
    ],
)
def test_invalid_pair_is_reported(parts, message):
    with pytest.raises(DataError, match=message):
        Row.build(make_pairs([([1], [1], [1]), parts], first_index=41), 8, PAD_TOKEN)


def test_long_pairs_are_counted_and_the_longest_is_reported():
    lengths = np.full((200_000, 3), 2)
    lengths[[3, 70_000, 70_001, 150_000, 150_001, 150_002]] = 5
    lengths[150_002, 0] = 90
    with pytest.raises(DataError, match=r"pair 3, .*pair 150001 and 1 more: up to 100"):
        check_lengths(lengths, row_tokens=10, share_prompt=True, location="pair {}".format)
    check_lengths(lengths, row_tokens=100, share_prompt=True, location=str)
    with pytest.raises(DataError, match="up to 190"):
        check_lengths(lengths, row_tokens=100, share_prompt=False, location=str)


def test_shared_prompt_is_counted_once():
    lengths = np.array([[3, 1, 2], [10, 20, 30]], np.int32)
    assert pair_tokens(lengths, share_prompt=True).tolist() == [6, 60]
    assert pair_tokens(lengths, share_prompt=False).tolist() == [9, 70]
