"""The figures of `megatron-idpo data`: lengths, rows, what sharing prompts saves.

All of it comes from the pairs' lengths; no token is read and no row is built. Lengths are of all
pairs. Rows depend on which pairs meet in a global batch, so they are planned for batches of the
run's own order, evenly spread over the run, by the function that plans them for training.

Shapes: P pairs; S steps looked at; R rows of all those steps and all data-parallel ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches, plan_batch, row_lengths
from megatron_idpo.data.packing.epoch_order import stream_pairs
from megatron_idpo.data.packing.rows import occupied_tokens
from megatron_idpo.data.tokenize.pair import IntArray, PairSource

SAMPLED_STEPS = 200
SAMPLED_PAIRS = 131_072
"""At most so many are planned: two seconds of work."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the values of something lie; each is one of them."""

    lowest: int
    median: int
    p90: int
    highest: int

    @classmethod
    def of(cls, values: IntArray) -> "Spread":
        """The spread of one or more integers."""
        levels = np.quantile(values, (0, 0.5, 0.9, 1), method="inverted_cdf")
        return cls(*(int(level) for level in levels))


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthFigures:
    """Tokens in the parts of all pairs."""

    parts: dict[str, Spread]
    """Of `prompt`, `chosen` and `rejected`, and of `pair`, the positions it takes in a row."""

    sharing_gain: float
    """Positions of all pairs with every prompt twice / with every prompt once; 1 or more."""


def length_figures(lengths_P3: IntArray, *, share_prompt: bool) -> LengthFigures:
    """The figures of int [P, 3] prompt/chosen/rejected lengths, P at least 1."""
    names = ("prompt", "chosen", "rejected")
    parts = {name: Spread.of(lengths_P3[:, column]) for column, name in enumerate(names)}
    parts["pair"] = Spread.of(occupied_tokens(lengths_P3, share_prompt=share_prompt))
    twice, once = (
        int(occupied_tokens(lengths_P3, share_prompt=shared).sum()) for shared in (False, True)
    )
    return LengthFigures(parts=parts, sharing_gain=twice / once)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowFigures:
    """The rows of the steps looked at, over all data-parallel ranks."""

    steps: int
    """Optimizer steps of the whole run."""

    left_over_pairs: int
    """Pairs at the end of the last epoch that fill no step."""

    rows_S: IntArray
    """Rows on each data-parallel rank: micro-batches of the step."""

    length_S: IntArray
    """Positions in each of the step's rows."""

    pairs_R: IntArray
    used_R: IntArray
    """Positions that hold a token."""

    positions_R: IntArray

    @property
    def fill_R(self) -> NDArray[np.float64]:
        """How much of each row holds tokens, 0 ... 1."""
        return self.used_R / self.positions_R

    @property
    def fill(self) -> float:
        """The same over all rows, empty ones included."""
        return float(self.used_R.sum() / self.positions_R.sum())


def row_figures(
    pairs: PairSource,
    settings: RowSettings,
    *,
    global_batch_pairs: int,
    seed: int,
    epochs: int,
) -> RowFigures:
    """Plans rows for steps of a run. Arguments and errors are those of `TrainingBatches`."""
    batches = TrainingBatches(
        pairs, settings, global_batch_pairs=global_batch_pairs, seed=seed, epochs=epochs
    )
    steps = batches.remaining_batches
    rows: list[tuple[int, int, int]] = []  # (pairs, tokens, positions)
    rows_S, length_S = [], []
    for step in sampled_steps(steps, global_batch_pairs):
        index_B = stream_pairs(
            step * global_batch_pairs, global_batch_pairs, num_pairs=len(pairs), seed=seed
        )
        lengths_B3 = pairs.lengths_P3[index_B]
        plan = plan_batch(lengths_B3, settings)
        tokens_B = occupied_tokens(lengths_B3, share_prompt=settings.share_prompt)
        rows_S.append(len(plan.pairs[0]))
        length_S.append(plan.row_tokens)
        rows += [
            (len(row), int(tokens_B[row].sum()), length)
            for rank, lengths in zip(plan.pairs, row_lengths(plan, tokens_B, settings), strict=True)
            for row, length in zip(rank, lengths, strict=True)
        ]
    pairs_R, used_R, positions_R = np.array(rows, np.int64).T
    return RowFigures(
        steps=steps,
        left_over_pairs=batches.dropped_pairs,
        rows_S=np.array(rows_S),
        length_S=np.array(length_S),
        pairs_R=pairs_R,
        used_R=used_R,
        positions_R=positions_R,
    )


def sampled_steps(steps: int, global_batch_pairs: int) -> Iterable[int]:
    """Step numbers, ascending, evenly spread over `steps` and few enough to be planned at once."""
    most = min(SAMPLED_STEPS, max(1, SAMPLED_PAIRS // global_batch_pairs))
    if steps <= most:
        return range(steps)
    return [location * steps // most for location in range(most)]
