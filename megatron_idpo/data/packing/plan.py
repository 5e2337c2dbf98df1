"""Which pairs of a global batch share a row, how long the rows are, and which rank gets which.

All rows of a step have one length, and a row costs that length in matrix multiplications however
full it is. So a plan is good when rows times row length is small: few rows, and all of them equally
full, because the fullest one sets the length (rounded up to `trim_tokens`). For a few numbers of
rows, from the fewest that hold the pairs upwards, the pairs are

* *spread*: the costliest pair left goes to the cheapest row (longest processing time first);
* *levelled*: a pair of the fullest row moves, or changes places with a pair of another row, as long
  as the fuller of the two becomes less full, down to the length that rounding makes free.

Where that leaves a row overfull, *best fit decreasing* puts the longest pair left where it leaves
the smallest gap, and its rows are levelled instead. Complete rows are dealt to ranks by their
attention, the only part of their cost in which they still differ. A row stays empty only if there
are more rows than pairs.

Everything is integer arithmetic on lengths in a fixed order, so all ranks come to the same plan
without talking.

Shapes: B pairs of a global batch, R rows of all ranks, M pairs of one row, C = B + R exchange
partners.
"""

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.packing.rows import occupied_tokens
from megatron_idpo.data.tokenize.pair import IntArray

VISITS_PER_TOKEN = 12_288
"""Query-key products that cost as much as one token's matrix multiplications.

A layer spends about 24 h^2 FLOPs on a token and 4 h on a query-key product, so 6 h of them weigh as
much as a token: this is h = 2048, or h = 4096 with attention at half the efficiency of the other
matrix multiplications. Below a thousand tokens a pair, attention is a few percent and the exact
number does not matter."""

ROW_OVERHEAD_TOKENS = 128
"""Positions that one more row has to save: what reading the weights, adding to the gradients and
launching the kernels once more costs."""

_MORE_ROWS = 3
"""How many larger numbers of rows are tried, in steps of what all ranks need."""

_EXCHANGES_PER_PAIR = 4
"""Levelling ends after this many exchanges, over ten times what real batches need."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of a global batch."""

    pairs: list[list[list[int]]]
    """[rank][row]: which of the B pairs lie in the row, ascending. Every rank has the same number
    of rows, those with most attention first, so that the ranks' rows of one turn are alike."""

    row_tokens: int
    """Positions in every row of every rank."""


def attention_visits(lengths_B3: IntArray, *, share_prompt: bool) -> NDArray[np.int64]:
    """Query-key products of each pair's causal attention: int64 [B]."""
    prompt_B, chosen_B, rejected_B = lengths_B3.astype(np.int64).T
    copies = 1 if share_prompt else 2
    visits_B: NDArray[np.int64] = copies * prompt_B * (prompt_B + 1) // 2
    for answer_B in (chosen_B, rejected_B):
        visits_B += answer_B * prompt_B + answer_B * (answer_B + 1) // 2
    return visits_B


def plan_rows(
    lengths_B3: IntArray,
    *,
    row_tokens: int,
    trim_tokens: int = 0,
    share_prompt: bool = True,
    ranks: int = 1,
    multiple: int = 1,
) -> Plan:
    """Pack the pairs of a global batch into the same number of equally long rows on every rank.

    Args:
        lengths_B3: int [B, 3], prompt/chosen/rejected lengths; no pair longer than a row.
        row_tokens: positions in a row at most.
        trim_tokens: rows are cut to the smallest multiple of this that holds the fullest one;
            0 never cuts.
        share_prompt: whether a pair's prompt is stored once.
        ranks: data-parallel ranks.
        multiple: rows on a rank are a multiple of this (the pipeline size under interleaving).
    """
    tokens_B = occupied_tokens(lengths_B3, share_prompt=share_prompt)
    visits_B = attention_visits(lengths_B3, share_prompt=share_prompt)
    assert tokens_B.max(initial=0) <= row_tokens, "a pair is longer than a row"
    step = ranks * multiple
    # No two pairs over half a row share one.
    alone = int((2 * tokens_B > row_tokens).sum())
    needed = max(1, alone, -(-int(tokens_B.sum()) // row_tokens))
    fewest = step * -(-needed // step)
    packings = (
        _pack(tokens_B, visits_B, num_rows, row_tokens, trim_tokens)
        for num_rows in count(fewest, step)
    )
    first = next(packing for packing in packings if packing)
    # Uncut rows cost the same each, so the fewest are the best.
    more = islice(packings, _MORE_ROWS if trim_tokens else 0)
    best = min([first, *filter(None, more)], key=lambda packing: packing.cost_tokens)
    return Plan(_deal(best, visits_B, ranks), best.row_tokens)


class _Packing(NamedTuple):
    """Which row each pair is in, not yet dealt to ranks."""

    row_B: NDArray[np.int64]
    num_rows: int
    row_tokens: int

    @property
    def cost_tokens(self) -> int:
        return self.num_rows * (self.row_tokens + ROW_OVERHEAD_TOKENS)


def _pack(
    tokens_B: NDArray[np.int64],
    visits_B: NDArray[np.int64],
    num_rows: int,
    row_tokens: int,
    trim_tokens: int,
) -> _Packing | None:
    """Distribute the pairs over `num_rows` rows as evenly as pays; None if they do not fit."""

    def rounded(used_tokens: int) -> int:
        trim = trim_tokens or row_tokens
        return min(row_tokens, max(1, -(-used_tokens // trim)) * trim)

    # No arrangement has shorter rows than these.
    level_tokens = rounded(max(int(tokens_B.max(initial=0)), -(-int(tokens_B.sum()) // num_rows)))
    costs_B = tokens_B * VISITS_PER_TOKEN + visits_B
    row_B = _spread(costs_B, num_rows)
    fullest_tokens = _level(row_B, tokens_B, num_rows, level_tokens)
    if fullest_tokens > row_tokens:
        fitted_B = _best_fit(tokens_B, num_rows, row_tokens)
        if fitted_B is None:
            return None
        row_B = fitted_B
        fullest_tokens = _level(row_B, tokens_B, num_rows, level_tokens)
    return _Packing(row_B, num_rows, rounded(fullest_tokens))


def _spread(costs_B: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """The costliest pair left goes to the cheapest row, whether it fits or not."""
    row_B = np.empty(len(costs_B), np.int64)
    cheapest = [(0, row) for row in range(num_rows)]
    for pair in np.argsort(-costs_B, kind="stable").tolist():
        cost, row = cheapest[0]
        row_B[pair] = row
        heapq.heapreplace(cheapest, (cost + int(costs_B[pair]), row))
    return row_B


def _best_fit(
    tokens_B: NDArray[np.int64], num_rows: int, row_tokens: int
) -> NDArray[np.int64] | None:
    """The longest pair left goes where it leaves the smallest gap; None if the rows do not do.

    Rows that remain unused are filled by halving the rows with most pairs.
    """
    packed: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for pair in np.argsort(-tokens_B, kind="stable").tolist():
        tokens = int(tokens_B[pair])
        location = bisect_left(gaps, (tokens, -1))
        if location < len(gaps):
            free_tokens, row = gaps.pop(location)
        else:
            free_tokens, row = row_tokens, len(packed)
            packed.append([])
        packed[row].append(pair)
        insort(gaps, (free_tokens - tokens, row))
    if len(packed) > num_rows:
        return None
    while len(packed) < num_rows:
        fullest = max(packed, key=len, default=[])
        packed.append(fullest[1::2])
        del fullest[1::2]
    row_B = np.empty(len(tokens_B), np.int64)
    for row, pairs in enumerate(packed):
        row_B[pairs] = row
    return row_B


def _level(
    row_B: NDArray[np.int64], tokens_B: NDArray[np.int64], num_rows: int, level_tokens: int
) -> int:
    """Even `row_B` out, in place, until no row is fuller than `level_tokens` or nothing helps.

    Every exchange is the one, of all that involve the fullest row, after which the fuller of its
    two rows is least full. None of them empties a row.

    Returns:
        Tokens in the fullest row.
    """
    num_pairs = len(row_B)
    # Every row offers its pairs, and nothing: that exchange is a move.
    row_C = np.concatenate([row_B, np.arange(num_rows)])
    tokens_C = np.concatenate([tokens_B, np.zeros(num_rows, np.int64)])
    used_R = np.zeros(num_rows, np.int64)
    np.add.at(used_R, row_B, tokens_B)
    for _ in range(_EXCHANGES_PER_PAIR * num_pairs):
        fullest = int(used_R.argmax())
        if used_R[fullest] <= level_tokens:
            break
        pair_M = np.flatnonzero(row_C[:num_pairs] == fullest)
        given_MC = tokens_C[pair_M, None] - tokens_C
        fuller_MC = np.maximum(used_R[fullest] - given_MC, used_R[row_C] + given_MC)
        fuller_MC[:, row_C == fullest] = used_R[fullest]
        location, partner = divmod(int(fuller_MC.argmin()), len(row_C))
        if fuller_MC[location, partner] >= used_R[fullest]:
            break
        given, other = given_MC[location, partner], int(row_C[partner])
        used_R[fullest] -= given
        used_R[other] += given
        row_C[pair_M[location]] = other
        if partner < num_pairs:
            row_C[partner] = fullest
    row_B[:] = row_C[:num_pairs]
    return int(used_R.max())


def _deal(packing: _Packing, visits_B: NDArray[np.int64], ranks: int) -> list[list[list[int]]]:
    """Give every rank the same number of rows, the one with most attention to the rank with least.

    Only attention counts here: matrix multiplications take as long on padding.
    """
    pairs: list[list[int]] = [[] for _ in range(packing.num_rows)]
    visits = [0] * packing.num_rows
    for pair, row in enumerate(packing.row_B.tolist()):
        pairs[row].append(pair)
        visits[row] += int(visits_B[pair])
    share = packing.num_rows // ranks
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for row in sorted(range(packing.num_rows), key=lambda row: (-visits[row], row)):
        rank_visits, rank = heapq.heappop(least)
        plan[rank].append(pairs[row])
        if len(plan[rank]) < share:
            heapq.heappush(least, (rank_visits + visits[row], rank))
    return plan
