"""The statistics of `megatron-idpo data`: lengths, rows, and the gain of prompt sharing.

All of it comes from the pairs' lengths; no token is read and no row is built. Length statistics
cover all pairs. Rows depend on which pairs meet in a global batch, so they are planned for batches
in the run's own order, evenly spread over the run, by the function that plans them for training.

Shapes: P pairs; S sampled steps; R rows of all those steps and all data-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches, plan_batch
from megatron_idpo.data.pairs import IntArray, PairSource, pair_tokens, stream_pairs
from megatron_idpo.data.tokenize.store import COLUMNS

MAX_SAMPLED_STEPS = 200
MAX_SAMPLED_PAIRS = 131_072
"""Planning this many pairs takes two seconds."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantiles of some integers; each is one of the integers."""

    min: int
    median: int
    p90: int
    max: int

    @classmethod
    def of(cls, values: IntArray) -> "Quantiles":
        """The quantiles of one or more integers."""
        levels = np.quantile(values, (0, 0.5, 0.9, 1), method="inverted_cdf")
        return cls(*(int(level) for level in levels))


def length_quantiles(lengths_P3: IntArray, *, share_prompt: bool) -> dict[str, Quantiles]:
    """Tokens of `prompt`, `chosen` and `rejected`, and of `pair`: the positions it needs in a row.

    `lengths_P3` is int [P, 3], prompt/chosen/rejected lengths, P at least 1.
    """
    quantiles = {name: Quantiles.of(lengths_P3[:, part]) for part, name in enumerate(COLUMNS)}
    return {**quantiles, "pair": Quantiles.of(pair_tokens(lengths_P3, share_prompt=share_prompt))}


def sharing_gain(lengths_P3: IntArray) -> float:
    """Positions of all pairs with every prompt stored twice / stored once; 1 or more."""
    twice, once = (pair_tokens(lengths_P3, share_prompt=share).sum() for share in (False, True))
    return float(twice / once)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowStatistics:
    """The rows of the sampled steps, over all data-parallel ranks."""

    steps: int
    """Optimizer steps of the whole run."""

    dropped_pairs: int
    """Pairs at the end of the last epoch that do not fill a step."""

    rows_S: IntArray
    """Rows on each data-parallel rank: micro-batches of the step."""

    length_S: IntArray
    """Positions in the longest of the step's rows."""

    pairs_R: IntArray
    used_R: IntArray
    """Positions that hold a token."""

    positions_R: IntArray

    @property
    def fill_R(self) -> NDArray[np.float64]:
        """The share of each row's positions that hold tokens, 0 ... 1."""
        return self.used_R / self.positions_R

    @property
    def fill(self) -> float:
        """The same over all rows, empty ones included."""
        return float(self.used_R.sum() / self.positions_R.sum())


def plan_sampled_steps(
    pairs: PairSource, settings: RowSettings, *, global_batch_pairs: int, seed: int, epochs: int
) -> RowStatistics:
    """Plan the rows of sampled steps of a run.

    Arguments and errors are those of `TrainingBatches`.
    """
    batches = TrainingBatches(
        pairs, settings, global_batch_pairs=global_batch_pairs, seed=seed, epochs=epochs
    )
    steps = batches.remaining_batches
    plans = []
    for step in sampled_steps(steps, global_batch_pairs):
        first = step * global_batch_pairs
        index_B = stream_pairs(first, global_batch_pairs, num_pairs=len(pairs), seed=seed)
        plans.append(plan_batch(pairs.lengths_P3[index_B], settings))
    rows = [row for ranks in plans for rank in ranks for row in rank]
    return RowStatistics(
        steps=steps,
        dropped_pairs=batches.dropped_pairs,
        rows_S=np.array([len(ranks[0]) for ranks in plans]),
        length_S=np.array([max(row.row_tokens for rank in r for row in rank) for r in plans]),
        pairs_R=np.array([len(row.pairs) for row in rows]),
        used_R=np.array([row.used_tokens for row in rows]),
        positions_R=np.array([row.row_tokens for row in rows]),
    )


def sampled_steps(steps: int, global_batch_pairs: int) -> Sequence[int]:
    """Step indices, ascending, evenly spread over `steps` and few enough to plan quickly."""
    limit = min(MAX_SAMPLED_STEPS, max(1, MAX_SAMPLED_PAIRS // global_batch_pairs))
    return range(steps) if steps <= limit else [at * steps // limit for at in range(limit)]
