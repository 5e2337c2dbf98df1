"""Packing plan of a global batch: which pairs share a row, the row length, the rows of each rank.

All rows of a step have the same length, and a row costs that length in matrix multiplications
however full it is. The cost is therefore rows times row length: a good plan has few rows, all
equally full, because the fullest one sets the length (rounded up to `trim_tokens`). For a few row
counts, from the fewest that hold the pairs upwards, the pairs are

* *spread*: the costliest remaining pair goes to the cheapest row (longest processing time first);
* *leveled*: a pair of the fullest row moves to another row, or swaps with one of its pairs, as long
  as the fuller of the two rows becomes less full, down to the length that rounding makes free.

If that leaves a row overfull, *best fit decreasing* puts the longest remaining pair where it leaves
the smallest gap, and its rows are leveled instead. Complete rows are assigned to ranks by their
attention cost, the only cost in which they still differ. A row stays empty only if there are more
rows than pairs.

Everything is integer arithmetic on lengths in a fixed order, so all ranks compute the same plan
without communication.

Shapes: B pairs of a global batch, R rows of all ranks, M pairs of one row, C = B + R swap partners.
"""

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.pairs import IntArray, pair_tokens

VISITS_PER_TOKEN = 12_288
"""Query-key products that cost as much as one token's matrix multiplications.

A layer spends about 24 h^2 FLOPs on a token and 4 h on a query-key product, so 6 h products cost as
much as a token: h = 2048 here, or h = 4096 with attention at half the efficiency of the other
matrix multiplications. Below a thousand tokens per pair, attention is a few percent of the cost and
the exact value does not matter."""

ROW_OVERHEAD_TOKENS = 128
"""Positions that one more row has to save: the cost of reading the weights, accumulating the
gradients and launching the kernels once more."""

_LARGER_ROW_COUNTS = 3
"""How many larger row counts are tried, in steps of `ranks * multiple`."""

_MAX_SWAPS_PER_PAIR = 4
"""Leveling ends after this many swaps, over ten times what real batches need."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of a global batch."""

    pairs: list[list[list[int]]]
    """[rank][row]: which of the B pairs are in the row, ascending. Every rank has the same number
    of rows, by decreasing attention cost, so that the ranks' n-th rows take similar time."""

    row_tokens: int
    """Positions in every row of every rank."""


MAX_GPU_ROW_LENGTHS = 4
"""Attention is compiled for each length, for up to a minute and a half on a busy machine. With
lengths at every 128 tokens a run of 300 steps met ten of them, the last at step 131, each time with
all other ranks waiting."""


def trimmed_length(used_tokens: int, *, row_tokens: int, trim_tokens: int) -> int:
    """The smallest multiple of `trim_tokens` (0: no trimming) that holds a row, or `row_tokens`."""
    trim = trim_tokens or row_tokens
    return min(row_tokens, max(1, -(-used_tokens // trim)) * trim)


def coarse_trim_tokens(row_tokens: int, trim_tokens: int) -> int:
    """A multiple of `trim_tokens` that gives at most `MAX_GPU_ROW_LENGTHS` lengths."""
    if not trim_tokens:
        return 0
    part_tokens = -(-row_tokens // MAX_GPU_ROW_LENGTHS)
    return -(-part_tokens // trim_tokens) * trim_tokens


def row_lengths(row_tokens: int, trim_tokens: int) -> list[int]:
    """Every length that `trimmed_length` can return."""
    multiples = range(trim_tokens, row_tokens, trim_tokens) if trim_tokens else ()
    return [*multiples, row_tokens]


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
        row_tokens: maximum positions in a row.
        trim_tokens: rows are trimmed to the smallest multiple of this that holds the fullest one;
            0 disables trimming.
        share_prompt: whether a pair's prompt is stored once.
        ranks: data-parallel ranks.
        multiple: rows on a rank are a multiple of this (the pipeline size under interleaving).
    """
    tokens_B = pair_tokens(lengths_B3, share_prompt=share_prompt)
    visits_B = attention_visits(lengths_B3, share_prompt=share_prompt)
    assert tokens_B.max(initial=0) <= row_tokens, "a pair is longer than a row"
    step = ranks * multiple
    # Lower bound on the rows: pairs longer than half a row cannot share one. Starting lower would
    # try row counts that cannot hold the pairs.
    num_long = int((2 * tokens_B > row_tokens).sum())
    needed = max(1, num_long, -(-int(tokens_B.sum()) // row_tokens))
    fewest = step * -(-needed // step)
    packings = (
        _pack(tokens_B, visits_B, num_rows, row_tokens, trim_tokens)
        for num_rows in count(fewest, step)
    )
    first = next(packing for packing in packings if packing)
    # Without trimming all rows have the same length, so the fewest rows are the cheapest.
    larger = islice(packings, _LARGER_ROW_COUNTS if trim_tokens else 0)
    best = min([first, *filter(None, larger)], key=lambda packing: packing.cost_tokens)
    return Plan(_assign_to_ranks(best, visits_B, ranks), best.row_tokens)


class _Packing(NamedTuple):
    """Which row each pair is in, before rows are assigned to ranks."""

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
    """Distribute the pairs over `num_rows` rows as evenly as useful; None if they do not fit."""
    rounded = partial(trimmed_length, row_tokens=row_tokens, trim_tokens=trim_tokens)
    # No arrangement has a shorter fullest row than this, so leveling stops there.
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
    """Longest processing time first: the row of each pair; rows may become overfull."""
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
    """Best fit decreasing: the row of each pair; None if more than `num_rows` rows are needed.

    Unused rows are filled by splitting the rows with most pairs in half.
    """
    packed: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for pair in np.argsort(-tokens_B, kind="stable").tolist():
        tokens = int(tokens_B[pair])
        smallest = bisect_left(gaps, (tokens, -1))
        if smallest < len(gaps):
            free_tokens, row = gaps.pop(smallest)
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
    """Level `row_B` in place, until no row exceeds `level_tokens` or no swap helps.

    Each step applies, of all swaps and moves that involve the fullest row, the one after which the
    fuller of its two rows is least full. No step empties a row.

    Returns:
        Tokens in the fullest row.
    """
    num_pairs = len(row_B)
    # Candidates: the B pairs, and per row a dummy of 0 tokens; swapping with a dummy is a move.
    row_C = np.concatenate([row_B, np.arange(num_rows)])
    tokens_C = np.concatenate([tokens_B, np.zeros(num_rows, np.int64)])
    used_R = np.zeros(num_rows, np.int64)
    np.add.at(used_R, row_B, tokens_B)
    for _ in range(_MAX_SWAPS_PER_PAIR * num_pairs):
        fullest = int(used_R.argmax())
        if used_R[fullest] <= level_tokens:
            break
        pair_M = np.flatnonzero(row_C[:num_pairs] == fullest)
        given_MC = tokens_C[pair_M, None] - tokens_C
        fuller_MC = np.maximum(used_R[fullest] - given_MC, used_R[row_C] + given_MC)
        # Swaps within the fullest row change nothing: they must not look like an improvement.
        fuller_MC[:, row_C == fullest] = used_R[fullest]
        mine, partner = divmod(int(fuller_MC.argmin()), len(row_C))
        if fuller_MC[mine, partner] >= used_R[fullest]:
            break
        given, other = given_MC[mine, partner], int(row_C[partner])
        used_R[fullest] -= given
        used_R[other] += given
        row_C[pair_M[mine]] = other
        if partner < num_pairs:
            row_C[partner] = fullest
    row_B[:] = row_C[:num_pairs]
    return int(used_R.max())


def _assign_to_ranks(
    packing: _Packing, visits_B: NDArray[np.int64], ranks: int
) -> list[list[list[int]]]:
    """[rank][row]: rows in decreasing attention cost, each to the rank with the least cost so far.

    Only attention counts: matrix multiplications take the same time on padding.
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
