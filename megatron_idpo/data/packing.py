"""Which pairs of a global batch share a row, and which rank gets the row.

A row costs its full length in matrix multiplications whether it is full or not, and every rank runs
the same number of rows, so the number of rows is what has to be small: the fewest that hold the
pairs. Within that number the pairs are spread so that rows and ranks cost the same, and a row stays
empty only if there are more rows than pairs.

Two heuristics are tried for each number of rows: *spreading*, which gives the costliest pair left
to the cheapest row (longest processing time first), and, where that overflows a row, *best fit
decreasing*, which puts the longest pair left where it leaves the smallest gap. Everything is
integer arithmetic on lengths, so all ranks come to the same plan without talking.

Shapes: B pairs of a global batch.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.pair import IntArray
from megatron_idpo.data.rows import occupied_tokens

VISITS_PER_TOKEN = 12_288
"""Query-key products that cost as much as one token's matrix multiplications.

A layer spends about 24 h^2 FLOPs on a token and 4 h on a query-key product, so 6 h of them weigh as
much as a token: this is h = 2048, or h = 4096 with attention at half the efficiency of the other
matrix multiplications. Below a thousand tokens a pair, attention is a few percent and the exact
number does not matter."""

Plan = list[list[list[int]]]
"""[rank][row][pairs]: which of the B pairs lie in which row of which rank."""


def pair_costs(lengths_B3: IntArray, *, share_prompt: bool) -> NDArray[np.int64]:
    """What each pair costs to train on: its tokens and its causal attention.

    Returns:
        int64 [B], in units of 1 / VISITS_PER_TOKEN of a token's matrix multiplications.
    """
    prompt_B, chosen_B, rejected_B = lengths_B3.astype(np.int64).T
    copies = 1 if share_prompt else 2
    visits_B = copies * prompt_B * (prompt_B + 1) // 2
    for answer_B in (chosen_B, rejected_B):
        visits_B += answer_B * prompt_B + answer_B * (answer_B + 1) // 2
    tokens_B = occupied_tokens(lengths_B3, share_prompt=share_prompt)
    costs_B: NDArray[np.int64] = tokens_B * VISITS_PER_TOKEN + visits_B
    return costs_B


def plan_rows(
    lengths_B3: IntArray,
    *,
    row_tokens: int,
    share_prompt: bool = True,
    ranks: int = 1,
    multiple: int = 1,
) -> Plan:
    """Pack the pairs of a global batch into the same number of rows on every rank.

    Args:
        lengths_B3: int [B, 3], prompt/chosen/rejected lengths; no pair longer than a row.
        row_tokens: positions in a row.
        share_prompt: whether a pair's prompt is stored once.
        ranks: data-parallel ranks.
        multiple: rows on a rank are a multiple of this (the pipeline size under interleaving).

    Returns:
        The plan; every rank has the same number of rows, at least `multiple`. A rank's rows go from
        costly to cheap, so that the ranks' rows of one turn are alike.
    """
    tokens = occupied_tokens(lengths_B3, share_prompt=share_prompt).tolist()
    costs = pair_costs(lengths_B3, share_prompt=share_prompt).tolist()
    assert max(tokens, default=0) <= row_tokens, "a pair is longer than a row"
    step = ranks * multiple
    rows = step * max(1, -(-sum(tokens) // (row_tokens * step)))
    while True:
        packed = _spread(tokens, costs, rows, row_tokens)
        if packed is None:
            packed = _best_fit(tokens, rows, row_tokens)
        if packed is not None:
            return _deal(packed, costs, ranks)
        rows += step


def _spread(
    tokens: Sequence[int], costs: Sequence[int], rows: int, row_tokens: int
) -> list[list[int]] | None:
    """The costliest pair left goes to the cheapest row; None where it does not fit there."""
    packed: list[list[int]] = [[] for _ in range(rows)]
    cheapest = [(0, row, 0) for row in range(rows)]
    for pair in sorted(range(len(costs)), key=lambda pair: (-costs[pair], pair)):
        cost, row, used_tokens = cheapest[0]
        used_tokens += tokens[pair]
        if used_tokens > row_tokens:
            return None
        heapq.heapreplace(cheapest, (cost + costs[pair], row, used_tokens))
        packed[row].append(pair)
    return packed


def _best_fit(tokens: Sequence[int], rows: int, row_tokens: int) -> list[list[int]] | None:
    """The longest pair left goes where it leaves the smallest gap; None if `rows` do not do.

    Rows that remain unused are filled by halving the rows with most pairs.
    """
    packed: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for pair in sorted(range(len(tokens)), key=lambda pair: (-tokens[pair], pair)):
        place = bisect_left(gaps, (tokens[pair], -1))
        if place < len(gaps):
            free_tokens, row = gaps.pop(place)
        else:
            free_tokens, row = row_tokens, len(packed)
            packed.append([])
        packed[row].append(pair)
        insort(gaps, (free_tokens - tokens[pair], row))
    if len(packed) > rows:
        return None
    while len(packed) < rows:
        fullest = max(packed, key=len, default=[])
        packed.append(fullest[1::2])
        del fullest[1::2]
    return packed


def _deal(packed: list[list[int]], costs: Sequence[int], ranks: int) -> Plan:
    """Give every rank the same number of rows, the costliest row left to the cheapest rank."""
    cost_of_row = [sum(costs[pair] for pair in row) for row in packed]
    share = len(packed) // ranks
    plan: Plan = [[] for _ in range(ranks)]
    cheapest = [(0, rank) for rank in range(ranks)]
    for row in sorted(range(len(packed)), key=lambda row: (-cost_of_row[row], row)):
        cost, rank = heapq.heappop(cheapest)
        plan[rank].append(sorted(packed[row]))
        if len(plan[rank]) < share:
            heapq.heappush(cheapest, (cost + cost_of_row[row], rank))
    return plan
