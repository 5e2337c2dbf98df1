"""A chart as SVG that lives in a page: it has the page's colours and type, and tells what it shows.

matplotlib draws it, in colours that stand for roles; what comes out is rewritten so that roles are
CSS variables (dark pages have others), identifiers are the chart's own, and nothing refers to
anything outside. A chart is 400 units wide, about as many pixels on a phone and a little more on a
desktop, and has no title: the page sets one above it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from warnings import catch_warnings, filterwarnings

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH, HEIGHT = 400.0, 230.0
FONT_SIZE = 12.5
_POINTS = 72
"""SVG units in an inch of matplotlib."""

INK, QUIET, GRID = "#100001", "#100002", "#100003"
"""Stand for text and axes, for what is said softly, and for lines behind."""

_ROLES = {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--grid)"}

_SERIES = (
    ("#0072b2", "#56b4e9"),
    ("#c8500a", "#ff9457"),
    ("#00805c", "#2fcb9f"),
    ("#a8437f", "#e79cc6"),
    ("#8a6400", "#f0c14a"),
    ("#5f6670", "#b4bac4"),
)
"""On light and on dark pages: Okabe and Ito's colours, each as dark or light as text needs."""

_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2.5), (1.5, 2), (8, 2.5, 1.5, 2.5), (3, 1.5))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LAYER = "#3000"
_SERIES_PREFIX = "#2000"
_PLACEHOLDER = re.compile(f"(?:{_SERIES_PREFIX}|{_LAYER})([0-9a-f]{{2}})")
_MOST_LAYERS = 12


@dataclass(frozen=True, slots=True)
class Style:
    """How a series is told from others: by colour, and by dashes and marks without it."""

    colour: str
    """A placeholder of this module."""

    dashes: tuple[float, ...]
    marker: str

    @property
    def css(self) -> str:
        """The colour in the page."""
        return in_css(self.colour)

    @property
    def linestyle(self) -> str | tuple[int, tuple[float, ...]]:
        """The dashes for matplotlib."""
        return (0, self.dashes) if self.dashes else "-"


def series_style(number: int) -> Style:
    """Of the series with this number, from 0. Colour and dashes repeat at different rates."""
    return Style(
        f"{_SERIES_PREFIX}{number % len(_SERIES):02x}",
        _DASHES[number % len(_DASHES)],
        _MARKERS[number % len(_MARKERS)],
    )


def layer_styles(layers: Sequence[int]) -> dict[int, Style]:
    """Of intermediate layers, from early to late; the final layer is `FINAL`."""
    assert len(layers) <= _MOST_LAYERS, layers
    ends = (0, _MOST_LAYERS - 1) if len(layers) > 1 else (5, 5)
    locations = np.linspace(*ends, len(layers))
    return {
        layer: Style(
            f"{_LAYER}{round(location):02x}",
            _DASHES[1 + number % (len(_DASHES) - 1)],
            _MARKERS[1 + number % (len(_MARKERS) - 1)],
        )
        for number, (layer, location) in enumerate(zip(layers, locations, strict=True))
    }


FINAL = Style(INK, (), "o")
"""Of the final layer, where layers are told apart."""


def colour_variables(*, dark: bool) -> str:
    """CSS that gives every placeholder its colour, as `--series-0: #0072b2; …`."""
    series = [f"--series-{number}: {pair[dark]};" for number, pair in enumerate(_SERIES)]
    # viridis, without the end that the page's own colour swallows.
    locations = (
        np.linspace(0.45, 0.95, _MOST_LAYERS) if dark else np.linspace(0.12, 0.54, _MOST_LAYERS)
    )
    layers = [
        f"--layer-{number}: {to_hex(colormaps['viridis'](location))};"
        for number, location in enumerate(locations)
    ]
    return " ".join([*series, *layers])


def in_css(colour: str) -> str:
    """The CSS value that a placeholder stands for."""
    if colour in _ROLES:
        return _ROLES[colour]
    name = "series" if colour.startswith(_SERIES_PREFIX) else "layer"
    return f"var(--{name}-{int(colour[-2:], 16)})"


def new_chart(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty chart of one panel."""
    figure = Figure(figsize=(WIDTH / _POINTS, height / _POINTS), dpi=_POINTS, layout="constrained")
    FigureCanvasSVG(figure)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=2 / _POINTS, h_pad=2 / _POINTS)  # type: ignore[call-arg]
    axes = figure.subplots()
    for patch in (figure.patch, axes.patch):
        patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(labelsize=FONT_SIZE, colors=QUIET, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def count_axis(axes: Axes, name: str, last: float, *, first: float = 0) -> None:
    """Whole numbers from left to right."""
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(name, fontsize=FONT_SIZE, color=QUIET, loc="right", labelpad=1)


def value_axis(axes: Axes, *, percent: bool = False) -> None:
    """Few numbers, short ones."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    message = f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:,.6g}"
    return message.replace("-", "\N{MINUS SIGN}")


def to_svg(figure: Figure, name: str, *, title: str, description: str) -> str:
    """The chart as an `<svg>` element.

    Args:
        figure: the chart; what it is drawn in are placeholders of this module.
        name: begins all its identifiers; each chart of a page has another.
        title: what it is, for those who do not see it.
        description: what it shows, likewise.
    """
    drawn = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), catch_warnings():
        # The page has its own fonts: what matplotlib's lacks is only measured a little wrong.
        filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    head = (
        f'<svg class="chart" viewBox="{view[1]}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return f"{head}{_rewritten(body, name)}</svg>"


def _rewritten(body: str, name: str) -> str:
    """Own identifiers, the page's colours and type, and no more digits than are seen."""
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', body))
    kept = {one or other for one, other in used}

    def identifier(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in kept else ""

    body = re.sub(r'\s+id="([^"]+)"', identifier, body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', body)
    # Which of these two it is depends on matplotlib's version.
    body = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family:[^;\"]*;? ?", "", body)
    # In tags alone: names that are drawn have numbers of their own.
    body = re.sub(r"<[^>]*>", lambda tag: _shown(tag[0]), body)
    return re.sub(r">\s+<", "><", body).strip()


def _shown(tag: str) -> str:
    """A tag in the page's colours, with short numbers."""
    tag = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", tag)
    for placeholder, css in _ROLES.items():
        tag = tag.replace(placeholder, css)
    return _PLACEHOLDER.sub(lambda match: in_css(match[0]), tag)


_MARKS = {
    "o": '<circle cx="17" cy="6" r="3.4"/>',
    "s": '<rect x="14" y="3" width="6" height="6"/>',
    "^": '<path d="M17 2l4 7h-8z"/>',
    "D": '<path d="M17 2l4 4-4 4-4-4z"/>',
    "v": '<path d="M17 10l4-7h-8z"/>',
    "P": '<path d="M15.8 2.5h2.4v2.3h2.3v2.4h-2.3v2.3h-2.4v-2.3h-2.3v-2.4h2.3z"/>',
}


def key_svg(style: Style) -> str:
    """A short line with a mark, for a legend; its name stands beside it."""
    dashes = f' stroke-dasharray="{" ".join(map(str, style.dashes))}"' if style.dashes else ""
    return (
        f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true" style="color: {style.css}">'
        f'<path d="M1 6h32" fill="none" stroke="currentColor" stroke-width="2"{dashes}/>'
        f'<g fill="currentColor">{_MARKS[style.marker]}</g></svg>'
    )
