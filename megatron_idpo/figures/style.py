"""Colors and line styles of all figures.

A figure is drawn in the colors of a light page. Each color has a CSS variable and a second value
for dark pages: `chart.py` replaces colors by variables where a figure becomes part of a page.
Color and dashes are those of a series (a model, a run, a layer), so that series differ
without color. Width and dots are those of what was measured: held-out pairs are thick with dots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

INK, QUIET, GRID = "#1c1e21", "#5c626b", "#e3e5e8"
"""Text and axes; secondary text and reference lines; grid lines. `page.css` has the dark values."""

_SERIES = (
    ("#0072b2", "#56b4e9"),
    ("#c8500a", "#ff9457"),
    ("#00805c", "#2fcb9f"),
    ("#a8437f", "#e79cc6"),
    ("#8a6400", "#f0c14a"),
    ("#5f6670", "#b4bac4"),
)
"""Okabe and Ito's colors, on light and on dark pages, adjusted to a contrast of 3:1."""

_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (6, 2.5),
    (1.5, 2),
    (8, 2.5, 1.5, 2.5),
    (3, 1.5),
    (12, 3),
    (8, 2, 1.5, 2, 1.5, 2),
)
_MARKER = "o"

NUM_LAYER_COLORS = 32


def _layer_colors(start: float, end: float) -> list[str]:
    return [to_hex(colormaps["viridis"](at)) for at in np.linspace(start, end, NUM_LAYER_COLORS)]


# The parts of viridis with enough contrast to a white and to a dark page.
_LAYERS = tuple(zip(_layer_colors(0.12, 0.54), _layer_colors(0.45, 0.95), strict=True))

VARIABLES: Mapping[str, str] = {
    INK: "ink",
    QUIET: "quiet",
    GRID: "grid",
    **{light: f"series-{index}" for index, (light, _) in enumerate(_SERIES)},
    **{light: f"layer-{index}" for index, (light, _) in enumerate(_LAYERS)},
}
"""Color in a figure -> name of its CSS variable. Colors are unique, see `_SERIES`, `_LAYERS`."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a series is drawn."""

    color: str
    """A key of `VARIABLES`."""

    dashes: tuple[float, ...]
    """Lengths of dashes and gaps in points; empty for a solid line."""

    def line(self, *, marked: bool = True) -> dict[str, Any]:
        """Color, dashes and marker as arguments of matplotlib's `plot`."""
        linestyle = (0, self.dashes) if self.dashes else "-"
        marker = _MARKER if marked else ""
        return {"color": self.color, "linestyle": linestyle, "marker": marker}


FINAL = Style(INK, ())
"""The final layer, where the figure shows layers of one run."""


def series_style(index: int) -> Style:
    """Style of the series with this index, from 0; cyclic, with a different period per property."""
    return Style(_SERIES[index % len(_SERIES)][0], _DASHES[index % len(_DASHES)])


def sequential_colors(count: int) -> list[str]:
    """`count` colors from dark to light, evenly spaced; distinct up to `NUM_LAYER_COLORS`."""
    if count == 1:
        return [_LAYERS[NUM_LAYER_COLORS // 2][0]]
    return [_LAYERS[round(at)][0] for at in np.linspace(0, NUM_LAYER_COLORS - 1, count)]


def layer_styles(layers: Sequence[int]) -> dict[int, Style]:
    """Styles of intermediate layers from early to late; none equals `FINAL`."""
    colors = sequential_colors(len(layers))
    dashes = _DASHES[1:]  # the first are those of `FINAL`
    return {
        layer: Style(color, dashes[index % len(dashes)])
        for index, (layer, color) in enumerate(zip(layers, colors, strict=True))
    }


def color_variables(*, dark: bool) -> str:
    """CSS declarations of the series' and layers' colors: `--series-0: #0072b2; …`."""
    pairs = [*_SERIES, *_LAYERS]
    return " ".join(f"--{VARIABLES[pair[0]]}: {pair[dark]};" for pair in pairs)


def css_color(color: str) -> str:
    """The CSS value of a figure's color."""
    return f"var(--{VARIABLES[color]})"


def key_svg(style: Style) -> str:
    """A legend key as `<svg>`: a short line."""
    dashes = f' stroke-dasharray="{" ".join(map(str, style.dashes))}"' if style.dashes else ""
    return (
        '<svg class="key" viewBox="0 0 34 12" aria-hidden="true" '
        f'style="color: {css_color(style.color)}">'
        f'<path d="M1 6h32" fill="none" stroke="currentColor" stroke-width="2"{dashes}/></svg>'
    )
