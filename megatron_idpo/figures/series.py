"""Series of values to draw: with intervals, smoothed, and thinned to what a figure can show.

Shapes: S points of a series; D drawn points, D <= `MAX_POINTS`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 400
"""Points of a line; more are not visible at the size of a figure."""

_WINDOW_SHARE = 1 / 20
_MIN_SMOOTHED_POINTS = 20
"""Shorter series are not smoothed."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Values over an x axis (steps, layers)."""

    x_S: Floats
    y_S: Floats
    low_S: Floats | None = None
    """Lower bound of a 95 % interval."""

    high_S: Floats | None = None

    def __len__(self) -> int:
        """S."""
        return len(self.x_S)

    @property
    def window(self) -> int:
        """Points in a window of the running mean: odd; 1 for a short series."""
        if len(self) < _MIN_SMOOTHED_POINTS:
            return 1
        return 2 * int(len(self) * _WINDOW_SHARE / 2) + 1

    def smoothed(self) -> "Series":
        """The centered running mean over `window` points.

        Towards the ends the window shrinks to half its size on both sides: a one-sided mean would
        bend a trend there.
        """
        index_S = np.arange(len(self))
        distance_to_end_S = np.minimum(index_S, index_S[::-1])
        half_S = np.clip(distance_to_end_S, self.window // 4, self.window // 2)
        low_S = np.maximum(index_S - half_S, 0)
        high_S = np.minimum(index_S + half_S + 1, len(self))
        sums = np.concatenate([[0.0], self.y_S.cumsum()])
        return Series(self.x_S, (sums[high_S] - sums[low_S]) / (high_S - low_S))

    def thinned(self) -> "Series":
        """At most `MAX_POINTS` of the points, including the first and the last."""
        if len(self) <= MAX_POINTS:
            return self
        index_D = np.linspace(0, len(self) - 1, MAX_POINTS).round().astype(np.int64)
        return Series(self.x_S[index_D], self.y_S[index_D])

    def extent(self) -> "tuple[Series, Series]":
        """Lowest and highest values of `MAX_POINTS` sections of a series, at their mean x."""
        starts_D = np.unique(np.linspace(0, len(self), MAX_POINTS, endpoint=False, dtype=int))
        sizes_D = np.diff(starts_D, append=len(self))
        x_D = np.add.reduceat(self.x_S, starts_D) / sizes_D
        low_D, high_D = (part.reduceat(self.y_S, starts_D) for part in (np.minimum, np.maximum))
        return Series(x_D, low_D), Series(x_D, high_D)
