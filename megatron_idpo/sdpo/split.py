"""Assignment of pairs to steps: by source, by fraction, from easy to hard, or at random.

A pair is easy if the first model, without a reference, already prefers the chosen answer:
log π(chosen) > log π(rejected), as sums over the answers' tokens or as means. sDPO
(arXiv 2403.19270) orders whole datasets, by their share of such pairs.

Shapes: P pairs, S sources, K pairs of a step, 2 = chosen, rejected.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.data.pairs import IntArray, stream_pairs
from megatron_idpo.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Easiness:
    """How much the first model prefers the chosen answer of every pair."""

    accuracy_P: NDArray[np.float64]
    """1 if it finds the chosen answer more likely, otherwise 0."""

    margin_P: NDArray[np.float64]
    """Difference of log-probabilities in nats, of whole answers or per token."""

    @classmethod
    def of(cls, logps_P2: NDArray[np.float32], lengths_P2: IntArray | None = None) -> "Easiness":
        """From log-probabilities.

        Args:
            logps_P2: of whole answers, float32 [P, 2].
            lengths_P2: their tokens, int32 [P, 2], to compare per token; None compares sums.
        """
        compared_P2 = logps_P2.astype(np.float64)
        if lengths_P2 is not None:
            compared_P2 /= lengths_P2
        margin_P = compared_P2[:, 0] - compared_P2[:, 1]
        return cls((margin_P > 0).astype(np.float64), margin_P)

    def measured(self, measure: str) -> NDArray[np.float64]:
        """float64 [P]: `accuracy` or `margin`."""
        return self.accuracy_P if measure == "accuracy" else self.margin_P

    def by_source(self, source_P: Indices, num_sources: int, measure: str) -> list[float]:
        """Mean over the pairs of each source; NaN for a source without pairs."""
        value_P = self.measured(measure)
        return [
            float(value_P[source_P == source].mean()) if (source_P == source).any() else np.nan
            for source in range(num_sources)
        ]


def split_pairs(
    sdpo: SdpoConfig, source_P: Indices, num_sources: int, easiness: Easiness, *, seed: int
) -> list[Indices]:
    """The pairs of each step: int64 indices, ascending; together all pairs of the named sources.

    Args:
        sdpo: how to split.
        source_P: int64 [P], index of each pair's source.
        num_sources: S.
        easiness: of every pair.
        seed: of `order: random`.

    Raises:
        DataError: a step has no pair.
    """
    by_sources = sdpo.names_sources or sdpo.takes_whole_sources
    if sdpo.names_sources:
        named = [[number - 1 for number in step.sources or ()] for step in sdpo.steps]
        slices = [np.flatnonzero(np.isin(source_P, sources)) for sources in named]
    elif sdpo.takes_whole_sources:
        mean_S = np.array(easiness.by_source(source_P, num_sources, sdpo.measure))
        easiest_first = np.argsort(-mean_S, kind="stable")
        slices = [np.flatnonzero(source_P == source) for source in easiest_first]
    else:
        slices = _by_fraction(sdpo, easiness, len(source_P), seed)
    for index, slice_K in enumerate(slices):
        if not len(slice_K):
            message = f"gets none of the {len(source_P)} pairs"
            remedy = "give it a larger fraction, or leave the step out"
            if by_sources:
                remedy = "leave out the source that has no pairs, or the step"
            raise DataError.at(f"sdpo.steps.{index}", message, remedy)
    return slices


def _by_fraction(sdpo: SdpoConfig, easiness: Easiness, num_pairs: int, seed: int) -> list[Indices]:
    """Order all pairs, then cut them at the steps' fractions."""
    ordered_P = np.arange(num_pairs)
    if sdpo.order == "random":
        ordered_P = stream_pairs(0, num_pairs, num_pairs=num_pairs, seed=seed)
    elif sdpo.order == "easy_to_hard":
        ordered_P = np.argsort(-easiness.measured(sdpo.measure), kind="stable")
    fractions = [step.fraction or 1 / len(sdpo.steps) for step in sdpo.steps]
    cuts = np.rint(np.cumsum(fractions)[:-1] * num_pairs).astype(np.int64)
    return [np.sort(slice_K) for slice_K in np.split(ordered_P, cuts)]
