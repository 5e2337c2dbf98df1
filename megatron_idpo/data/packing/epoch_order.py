"""The order in which training meets the pairs: shuffled anew in every epoch, without a table.

Training reads one endless stream: epoch 0's permutation of the pairs, then epoch 1's, and so on.
The pair at any place of the stream is computed from (seed, place) alone, by a keyed permutation: a
Feistel network over the next power of four, walked until it lands inside the collection. So a
resumed run needs to know only how many pairs were consumed, memory does not grow with the number of
pairs, and the order depends on no library's random stream, which may change between versions.

It is a shuffle, not a cipher. Shapes: B places of the stream.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads low bits upwards.


def stream_pairs(first: int, count: int, *, num_pairs: int, seed: int) -> NDArray[np.int64]:
    """The pairs at places `first ... first + count - 1` of the training stream.

    Args:
        first: places before these, that is, pairs already consumed; 0 or more.
        count: how many.
        num_pairs: size of the collection, 1 or more; every run of that many places that starts at a
            multiple of it is one epoch and holds every pair once.
        seed: any integer.

    Returns:
        int64 [count], indices in 0 ... num_pairs - 1.
    """
    place_B = np.arange(first, first + count)
    epoch_B = place_B // num_pairs
    pairs_B = np.empty(count, np.int64)
    for epoch in range(first // num_pairs, (first + count - 1) // num_pairs + 1):
        inside = epoch_B == epoch
        pairs_B[inside] = _permute(place_B[inside] - epoch * num_pairs, num_pairs, seed, epoch)
    return pairs_B


def _permute(
    place_B: NDArray[np.int64], num_pairs: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """A permutation of 0 ... num_pairs - 1 chosen by (seed, epoch), at the given places."""
    half_bits = max(1, ((num_pairs - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    result_B = _feistel(place_B.astype(np.uint64), keys, half_bits)
    # At most 4 values in 1 lie inside; following the permutation's cycle from a place inside comes
    # back inside, and different places stay different.
    while (outside := result_B >= num_pairs).any():
        result_B[outside] = _feistel(result_B[outside], keys, half_bits)
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
