"""Dealing a row's positions to context-parallel ranks.

Every rank gets the same number of positions, hence equal work in everything but attention. The
attention of a position costs as much as the keys that it sees, which varies by thousands within a
long row. So positions are dealt in blocks, costliest block first, each to the rank with the least
attention so far that still has room (longest processing time first).

The costliest blocks are the ends of long sequences, where the answers are. So each rank also gets a
similar number of response tokens, which the output heads score.

Everything is integer arithmetic in a fixed order: all ranks deal alike without communication.

Shapes: T row positions, L = T / ranks positions of a rank, G attention groups, K blocks.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

MAX_BLOCK_TOKENS = 128
"""FlexAttention's block of queries: consecutive positions need the fewest partly visible blocks."""

BLOCKS_PER_RANK = 16
"""Blocks are made smaller until a rank has as many, since a block is the unit of the balance."""


def deal_positions(spans_G4: NDArray[np.int32], row_tokens: int, ranks: int) -> NDArray[np.int64]:
    """The positions of every rank, ascending: int64 `[ranks, L]`.

    Args:
        spans_G4: the row's groups (`Row.spans_G4`).
        row_tokens: T, a multiple of `ranks`.
        ranks: context-parallel ranks.
    """
    assert row_tokens % ranks == 0, f"{row_tokens} positions over {ranks} ranks"
    own_tokens = row_tokens // ranks
    block = block_tokens(own_tokens)
    cost_K = keys_seen(spans_G4, row_tokens).reshape(-1, block).sum(1)
    rank_K = np.empty(len(cost_K), np.int64)
    room = [own_tokens // block] * ranks
    cheapest = [(0, rank) for rank in range(ranks)]
    for index in np.argsort(-cost_K, kind="stable").tolist():
        cost, rank = heapq.heappop(cheapest)
        rank_K[index] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(cheapest, (cost + int(cost_K[index]), rank))
    # A stable sort by rank keeps the positions of a rank ascending.
    order_T = np.argsort(np.repeat(rank_K, block), kind="stable")
    return order_T.reshape(ranks, own_tokens)


def block_tokens(own_tokens: int) -> int:
    """Positions that are dealt together: a power of 2 that divides a rank's positions."""
    block = MAX_BLOCK_TOKENS
    while block > 1 and (own_tokens % block or own_tokens // block < BLOCKS_PER_RANK):
        block //= 2
    return block


def keys_seen(spans_G4: NDArray[np.int32], row_tokens: int) -> NDArray[np.int64]:
    """How many keys each position sees without a window, itself included: int64 `[T]`."""
    seen_T = np.zeros(row_tokens, np.int64)
    for b0, b1, b2, b3 in spans_G4.tolist():
        seen_T[b0:b2] = np.arange(1, b2 - b0 + 1)
        seen_T[b2:b3] = np.arange(b1 - b0 + 1, b1 - b0 + b3 - b2 + 1)
    return seen_T
