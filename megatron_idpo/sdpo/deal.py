"""Pairs dealt out to the steps: by source, by fraction, from easy to hard, or at random.

Easy is what the first model gets right already, without a reference: log π(chosen) above
log π(rejected), sums over the answers' tokens or means. sDPO (arXiv 2403.19270) lines up whole
datasets, by their share of such pairs.

Shapes: P pairs, S sources, 2 = chosen, rejected.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.data.packing.epoch_order import stream_pairs
from megatron_idpo.data.tokenize.pair import IntArray
from megatron_idpo.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Easiness:
    """What the first model makes of every pair."""

    accuracy_P: NDArray[np.float64]
    """1 where it finds the chosen answer more likely, else 0."""

    margin_P: NDArray[np.float64]
    """By how much: a difference of log-probabilities, of whole answers or per token."""

    @classmethod
    def of(cls, logps_P2: NDArray[np.float32], lengths_P2: IntArray | None = None) -> "Easiness":
        """Measure.

        Args:
            logps_P2: of whole answers, float32 [P, 2].
            lengths_P2: their tokens, int32 [P, 2], to compare per token; None compares sums.
        """
        told_P2 = logps_P2.astype(np.float64)
        if lengths_P2 is not None:
            told_P2 /= lengths_P2
        margin_P = told_P2[:, 0] - told_P2[:, 1]
        return cls((margin_P > 0).astype(np.float64), margin_P)

    def measured(self, measure: str) -> NDArray[np.float64]:
        """float64 [P]: `accuracy` or `margin`."""
        return self.accuracy_P if measure == "accuracy" else self.margin_P

    def by_source(self, source_P: Indices, num_sources: int, measure: str) -> list[float]:
        """The mean of each source's pairs; NaN where it has none."""
        value_P = self.measured(measure)
        return [
            float(value_P[source_P == source].mean()) if (source_P == source).any() else np.nan
            for source in range(num_sources)
        ]


def deal(
    sdpo: SdpoConfig, source_P: Indices, num_sources: int, easiness: Easiness, *, seed: int
) -> list[Indices]:
    """Each step's pairs: int64 indices, ascending; together all pairs of the named sources.

    Args:
        sdpo: how.
        source_P: int64 [P], which source each pair comes from, counted from 0.
        num_sources: S.
        easiness: of every pair.
        seed: of `order: random`.

    Raises:
        DataError: a step has no pair.
    """
    slices = _dealt(sdpo, source_P, num_sources, easiness, seed)
    for index, slice_K in enumerate(slices):
        if not len(slice_K):
            message = f"gets none of the {len(source_P)} pairs"
            remedy = "give it a larger fraction, or leave the step out"
            if sdpo.deals_sources or sdpo.takes_whole_sources:
                remedy = "leave out the source that has no pairs, or the step"
            raise DataError.at(f"sdpo.steps.{index}", message, remedy)
    return slices


def _dealt(
    sdpo: SdpoConfig, source_P: Indices, num_sources: int, easiness: Easiness, seed: int
) -> list[Indices]:
    if sdpo.deals_sources:
        named = [[number - 1 for number in step.sources or ()] for step in sdpo.steps]
        return [np.flatnonzero(np.isin(source_P, sources)) for sources in named]
    if sdpo.takes_whole_sources:
        mean_S = np.array(easiness.by_source(source_P, num_sources, sdpo.measure))
        easiest_first = np.argsort(-mean_S, kind="stable")
        return [np.flatnonzero(source_P == source) for source in easiest_first]
    lined_up_P = np.arange(len(source_P))
    if sdpo.order == "random":
        lined_up_P = stream_pairs(0, len(source_P), num_pairs=len(source_P), seed=seed)
    elif sdpo.order == "easy_to_hard":
        lined_up_P = np.argsort(-easiness.measured(sdpo.measure), kind="stable")
    fractions = [step.fraction or 1 / len(sdpo.steps) for step in sdpo.steps]
    return [np.sort(slice_K) for slice_K in np.split(lined_up_P, _cuts(fractions, len(source_P)))]


def _cuts(fractions: Sequence[float], num_pairs: int) -> NDArray[np.int64]:
    """Where one step's pairs end and the next one's begin."""
    ends = np.cumsum(fractions)[:-1] * num_pairs
    return np.rint(ends).astype(np.int64)
