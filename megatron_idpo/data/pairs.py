"""Tokenized preference pairs, what a collection of them must offer, and the training order.

This is the interface between `tokenize/` and `packing/`. Planning reads only lengths; tokens are
fetched when the row that holds the pair is built. Nothing here truncates, validates text or needs a
tokenizer.

Training reads one endless stream: epoch 0's permutation of the pairs, then epoch 1's, and so on.
The pair at any position of the stream is computed from (seed, position) alone by a keyed
permutation: a Feistel network over the next power of four, applied until it lands inside the
collection. A resumed run therefore only needs the number of consumed pairs, memory does not grow
with the number of pairs, and the order does not depend on a library's random generator, which may
change between versions. It is a shuffle, not a cipher.

Shapes: P pairs in the collection; 3 = prompt, chosen, rejected; B positions of the stream.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]
"""A numpy array of any integer type."""

_ROUNDS = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads low bits upwards.


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A prompt with the chosen and the rejected answer, as token ids.

    The prompt has at least one token (a BOS if nothing else): the first token of an answer is
    predicted from the prompt's last position. EOS or end-of-turn belongs to the answers.
    """

    index: int
    """Index in the collection; the key of the pair's reference log-probabilities."""

    prompt_tokens: NDArray[np.int32]
    chosen_tokens: NDArray[np.int32]
    rejected_tokens: NDArray[np.int32]


class PairSource(Protocol):
    """A random-access collection of tokenized pairs."""

    @property
    def lengths_P3(self) -> IntArray:
        """int [P, 3]: tokens in prompt, chosen and rejected of every pair; may be memory-mapped."""

    def __len__(self) -> int:
        """The number of pairs P."""

    def __getitem__(self, index: int, /) -> Pair:
        """The pair at `index`, 0 <= index < P."""


def pair_tokens(lengths_B3: IntArray, *, share_prompt: bool) -> NDArray[np.int64]:
    """Row positions each pair needs: int64 [B], from prompt/chosen/rejected lengths [B, 3]."""
    prompt_B, chosen_B, rejected_B = lengths_B3.astype(np.int64).T
    tokens_B: NDArray[np.int64] = (1 if share_prompt else 2) * prompt_B + chosen_B + rejected_B
    return tokens_B


def stream_pairs(first: int, count: int, *, num_pairs: int, seed: int) -> NDArray[np.int64]:
    """The pairs at positions `first ... first + count - 1` of the training stream.

    Args:
        first: position of the first pair, that is, pairs already consumed; 0 or more.
        count: number of positions.
        num_pairs: size of the collection, 1 or more. Positions k * num_pairs to
            (k + 1) * num_pairs - 1 are epoch k and hold every pair once.
        seed: any integer.

    Returns:
        int64 [count], indices in 0 ... num_pairs - 1.
    """
    position_B = np.arange(first, first + count)
    epoch_B = position_B // num_pairs
    pairs_B = np.empty(count, np.int64)
    for epoch in range(first // num_pairs, (first + count - 1) // num_pairs + 1):
        in_epoch_B = epoch_B == epoch
        local_B = position_B[in_epoch_B] - epoch * num_pairs
        pairs_B[in_epoch_B] = _permute(local_B, num_pairs, seed, epoch)
    return pairs_B


def _permute(
    position_B: NDArray[np.int64], num_pairs: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The permutation of 0 ... num_pairs - 1 chosen by (seed, epoch), at the given positions."""
    half_bits = max(1, ((num_pairs - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    result_B = _feistel(position_B.astype(np.uint64), keys, half_bits)
    # The network permutes up to 4 * num_pairs values. Cycle walking: applying it again to a value
    # outside the collection follows the permutation's cycle, which returns inside, and different
    # positions still map to different pairs.
    while (outside_B := result_B >= num_pairs).any():
        result_B[outside_B] = _feistel(result_B[outside_B], keys, half_bits)
    return result_B.astype(np.int64)


def _feistel(
    value_B: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int
) -> NDArray[np.uint64]:
    """A keyed bijection of the integers below 4 ** half_bits."""
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left_B, right_B = value_B >> bits, value_B & mask
    for key in keys:
        mixed_B = (right_B ^ key) * _MULTIPLIER
        mixed_B = (mixed_B ^ (mixed_B >> np.uint64(29))) * _MULTIPLIER
        left_B, right_B = right_B, left_B ^ ((mixed_B >> np.uint64(32)) & mask)
    return (left_B << bits) | right_B
