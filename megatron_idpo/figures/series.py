"""The numbers behind the curves: series of a metrics file, smoothed, and few enough to be drawn.

Shapes: S logged points of a series; D drawn points.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.file import STEP, Record
from megatron_idpo.train.metrics.names import ACCURACY, EVAL, EVAL_PAIRS, MARGIN

MAX_DRAWN = 800
"""Points in a line; more are not told apart at the picture's size."""

_SMOOTHED_OVER = 1 / 20
_LEAST_SMOOTHED = 20
"""Series shorter than this are drawn as they are."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A quantity over the steps where it is known."""

    steps_S: Floats
    values_S: Floats

    @classmethod
    def of(cls, records: Sequence[Record], name: str) -> "Series":
        """The finite values of this name; of an accuracy, those that mean something.

        Where policy and reference are equal all pairs are tied: that is no accuracy of 0.
        """
        margin = f"{name.removesuffix(ACCURACY)}{MARGIN}" if name.endswith(ACCURACY) else None
        points = [
            (record[STEP], record[name])
            for record in records
            if name in record and not (margin and is_tied(record[name], record.get(margin)))
        ]
        steps_S, values_S = np.array(points, np.float64).reshape(-1, 2).T
        known_S = np.isfinite(values_S)
        return cls(steps_S[known_S], values_S[known_S])

    def __len__(self) -> int:
        """S."""
        return len(self.steps_S)

    @property
    def window(self) -> int:
        """How many points its running mean is over; odd, 1 for a short series."""
        if len(self) < _LEAST_SMOOTHED:
            return 1
        return 2 * int(len(self) * _SMOOTHED_OVER / 2) + 1

    def smoothed(self) -> "Series":
        """The running mean over `window` points, centred.

        Towards the ends it is over half as many, so that a trend bends them less.
        """
        index_S = np.arange(len(self))
        to_the_end_S = np.minimum(index_S, index_S[::-1])
        half_S = np.clip(to_the_end_S, self.window // 4, self.window // 2)
        low_S = np.maximum(index_S - half_S, 0)
        high_S = np.minimum(index_S + half_S + 1, len(self))
        sums = np.concatenate([[0.0], self.values_S.cumsum()])
        return Series(self.steps_S, (sums[high_S] - sums[low_S]) / (high_S - low_S))

    def thinned(self) -> "Series":
        """At most about `MAX_DRAWN` of the points, the first and the last among them."""
        if len(self) <= MAX_DRAWN:
            return self
        index_D = np.linspace(0, len(self) - 1, MAX_DRAWN).round().astype(np.int64)
        return Series(self.steps_S[index_D], self.values_S[index_D])

    def extent(self) -> tuple[Floats, Floats, Floats]:
        """Steps, and the lowest and highest value around each: `[D]`, D <= `MAX_DRAWN`."""
        parts = list(self._parts())
        steps_D = np.array([steps.mean() for steps, _ in parts])
        low_D = np.array([values.min() for _, values in parts])
        high_D = np.array([values.max() for _, values in parts])
        return steps_D, low_D, high_D

    def _parts(self) -> Iterator[tuple[Floats, Floats]]:
        count = min(len(self), MAX_DRAWN)
        if count:
            split = (np.array_split(array, count) for array in (self.steps_S, self.values_S))
            yield from zip(*split, strict=True)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutAccuracy:
    """The final layer's accuracy on held-out pairs, where it means something."""

    shares: Series
    low_S: Floats
    high_S: Floats
    """95 % interval; equal to the share where the number of pairs is not known."""

    pairs: int
    """The most that were read; 0: not known."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> "HeldOutAccuracy":
        """The accuracy of those evaluations that have one."""
        shares = Series.of(records, f"{EVAL}{ACCURACY}")
        counts = {record[STEP]: record.get(EVAL_PAIRS, 0.0) for record in records}
        bounds = [
            wilson_interval(share, counts[step]) if counts[step] else (share, share)
            for step, share in zip(shares.steps_S, shares.values_S, strict=True)
        ]
        low_S, high_S = np.array(bounds, np.float64).reshape(-1, 2).T
        return cls(shares, low_S, high_S, int(max(counts.values(), default=0)))
