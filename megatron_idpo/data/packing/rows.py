"""A row: one micro-batch of whole preference pairs in a fixed number of positions.

With shared prompts a pair occupies prompt, chosen, rejected, once each, and no prompt token is
computed twice:

    tokens        p0 p1 p2 | c0 c1 c2 | r0 r1 |  ...next pair...  | pad
    position_ids   0  1  2 |  3  4  5 |  3  4 |

Without sharing it occupies prompt+chosen, prompt+rejected, as two plain sequences. The output heads
score a list of targets, one for each response token: the row position whose hidden state predicts
it, the token, and the sequence it belongs to. There is no label shift and no loss mask, and prompts
and padding cost nothing in the vocabulary projection.

A row's arrays are all that a rank needs; every tensor and pipeline rank builds the same ones.
`plan.py` decides which pairs share a row; `mcore/attention/` implements the attention pattern that
`spans_G4` describes.

Shapes: T row positions, N targets, P pairs in the row, G attention groups (P with shared prompts,
2P without), S = 4P segments of tokens, B pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.pairs import IntArray, Pair, pair_tokens
from megatron_idpo.errors import DataError

_PARTS = ("prompt", "chosen answer", "rejected answer")
_MAX_REPORTED_PAIRS = 5
_CHECKED_PAIRS = 1 << 16
"""Lengths checked at a time: below 1 MB."""


def check_lengths(
    lengths_B3: IntArray, *, row_tokens: int, share_prompt: bool, location: Callable[[int], str]
) -> None:
    """Check that every pair has a prompt and two answers and fits into a row.

    Args:
        lengths_B3: int [B, 3], prompt/chosen/rejected lengths.
        row_tokens: positions in a row.
        share_prompt: whether the prompt is stored once.
        location: where the b-th pair was read, for messages.

    Raises:
        DataError: an empty prompt or answer (the first pair that has one), or pairs longer than a
            row (the first few locations, and the row length that holds the longest pair).
    """
    too_long: list[int] = []  # the first few
    num_too_long = needed_tokens = 0
    # Block by block: the lengths of a large collection are a file that need not be in memory.
    for first in range(0, len(lengths_B3), _CHECKED_PAIRS):
        block_B3 = lengths_B3[first : first + _CHECKED_PAIRS]
        _check_not_empty(block_B3, first, location)
        tokens_B = pair_tokens(block_B3, share_prompt=share_prompt)
        pairs = first + np.flatnonzero(tokens_B > row_tokens)
        num_too_long += len(pairs)
        too_long += pairs[: _MAX_REPORTED_PAIRS - len(too_long)].tolist()
        needed_tokens = max(needed_tokens, int(tokens_B.max()))
    if too_long:
        locations = ", ".join(map(location, too_long))
        if num_too_long > len(too_long):
            locations += f" and {num_too_long - len(too_long)} more"
        raise DataError.at(
            locations,
            f"up to {needed_tokens} positions needed, a row has {row_tokens}",
            f"set data.row_tokens to {needed_tokens} or more, or lower data.max_length",
        )


def _check_not_empty(block_B3: IntArray, first: int, location: Callable[[int], str]) -> None:
    """Check that every pair of a block, which starts with pair `first`, has all three parts."""
    if (block_B3 < 1).any():
        pair, part = np.argwhere(block_B3 < 1)[0].tolist()
        remedy = "there is nothing to score: drop the pair"
        if part == 0:
            remedy = "its last position predicts the answers' first tokens: begin it with a BOS"
        raise DataError.at(location(first + pair), f"the {_PARTS[part]} is empty", remedy)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One micro-batch: `T` positions that hold whole pairs, and the targets to score."""

    tokens_T: NDArray[np.int64]
    position_ids_T: NDArray[np.int64]
    """Position of each token within its own sequence; 0 on padding."""

    spans_G4: NDArray[np.int32]
    """Bounds b0 <= b1 <= b2 <= b3 of each group: prompt [b0, b1), chosen [b1, b2), rejected
    [b2, b3). A plain sequence is (b0, e, e, e). Ascending and disjoint; outside is padding."""

    target_positions_N: NDArray[np.int64]
    """Where each response token is predicted: at the token before it in its own sequence."""

    target_tokens_N: NDArray[np.int64]
    target_sequences_N: NDArray[np.int64]
    """2*pair for chosen, 2*pair + 1 for rejected, pair counted within the row; ascending."""

    pair_index_P: NDArray[np.int64]
    """`Pair.index` of each pair: the key of its reference log-probabilities."""

    @property
    def num_pairs(self) -> int:
        """Pairs in this row; 0 in an empty row."""
        return len(self.pair_index_P)

    @property
    def used_tokens(self) -> int:
        """Positions that hold a token."""
        return int((self.spans_G4[:, 3] - self.spans_G4[:, 0]).sum())

    @staticmethod
    def empty(row_tokens: int, pad_token: int) -> "Row":
        """A row without pairs, which keeps ranks in step: all padding and no target."""
        return Row.build([], row_tokens, pad_token)

    @staticmethod
    def build(
        pairs: Sequence[Pair], row_tokens: int, pad_token: int, *, share_prompt: bool = True
    ) -> "Row":
        """Lay `pairs` side by side, in the given order.

        Args:
            pairs: the pairs of this row.
            row_tokens: positions T.
            pad_token: token id of unused positions.
            share_prompt: store each prompt once per pair rather than once per answer.

        Raises:
            DataError: a pair has an empty prompt or answer or is longer than the row.
        """
        parts = [(p.prompt_tokens, p.chosen_tokens, p.rejected_tokens) for p in pairs]
        lengths = [[len(tokens) for tokens in part] for part in parts]
        lengths_P3 = np.array(lengths, np.int64).reshape(-1, 3)
        check_lengths(
            lengths_P3,
            row_tokens=row_tokens,
            share_prompt=share_prompt,
            location=lambda pair: f"pair {pairs[pair].index}",
        )
        prompt_P, chosen_P, rejected_P = lengths_P3.T
        # Both layouts have four segments per pair; a shared prompt's second copy has length 0.
        second_P = np.zeros_like(prompt_P) if share_prompt else prompt_P
        length_P4 = np.stack([prompt_P, chosen_P, second_P, rejected_P], axis=1)
        end_P4 = length_P4.cumsum().reshape(-1, 4)
        start_P4 = end_P4 - length_P4
        used_tokens = int(length_P4.sum())

        tokens_T = np.full(row_tokens, pad_token, np.int64)
        segments = [np.zeros(0, np.int32)]  # An empty row has no others.
        for prompt, chosen, rejected in parts:
            segments += (prompt, chosen, prompt[: 0 if share_prompt else None], rejected)
        tokens_T[:used_tokens] = np.concatenate(segments)
        # Positions restart at 0 with a prompt and at the prompt's length with an answer, in both
        # layouts: both answers see the same rotary phases as without packing.
        position_ids_T = np.zeros(row_tokens, np.int64)
        first_id_P4 = np.stack([0 * prompt_P, prompt_P, 0 * prompt_P, prompt_P], axis=1)
        position_ids_T[:used_tokens] = np.arange(used_tokens) - np.repeat(
            (start_P4 - first_id_P4).ravel(), length_P4.ravel()
        )
        # A response token is predicted at the position before it, except for an answer's first
        # token, which the last prompt token predicts: with a shared prompt, the chosen answer lies
        # between the prompt and the rejected answer.
        answer_lengths = length_P4[:, 1::2].ravel()
        answer_starts = start_P4[:, 1::2].ravel()
        prompt_ends = (end_P4[:, [0, 0]] if share_prompt else end_P4[:, 0::2]).ravel()
        first_targets = answer_lengths.cumsum() - answer_lengths
        answer_positions_N = np.arange(answer_lengths.sum()) + np.repeat(
            answer_starts - first_targets, answer_lengths
        )
        target_positions_N = answer_positions_N - 1
        target_positions_N[first_targets] = prompt_ends - 1
        return Row(
            tokens_T=tokens_T,
            position_ids_T=position_ids_T,
            spans_G4=_spans(start_P4, end_P4, share_prompt=share_prompt),
            target_positions_N=target_positions_N,
            target_tokens_N=tokens_T[answer_positions_N],
            target_sequences_N=np.repeat(np.arange(2 * len(pairs)), answer_lengths),
            pair_index_P=np.array([pair.index for pair in pairs], np.int64),
        )


def _spans(start_P4: IntArray, end_P4: IntArray, *, share_prompt: bool) -> NDArray[np.int32]:
    """Group bounds `spans_G4` from the bounds of each pair's four segments."""
    if share_prompt:
        bounds = np.column_stack([start_P4[:, 0], end_P4[:, 0], end_P4[:, 1], end_P4[:, 3]])
        return bounds.astype(np.int32)
    end_G = end_P4[:, 1::2].ravel()
    return np.column_stack([start_P4[:, 0::2].ravel(), end_G, end_G, end_G]).astype(np.int32)
