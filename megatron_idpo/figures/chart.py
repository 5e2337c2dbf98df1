"""A chart, which becomes an `<svg>` of the report page or a panel of a PNG or SVG file.

Drawn by matplotlib without a display and without its global state. In a page a chart takes the
page's colors (CSS variables, which differ on dark pages) and fonts, has unique identifiers and
no external references. It is 400 units wide, about as many pixels on a phone. The page sets
title and note above it; in a file they are part of the panel.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from warnings import catch_warnings, filterwarnings

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megatron_idpo.errors import ConfigError
from megatron_idpo.figures.numbers import decimal
from megatron_idpo.figures.style import GRID, INK, QUIET, VARIABLES, Style, css_color, series_style
from megatron_idpo.storage.atomic import atomic_file

WIDTH, HEIGHT = 400.0, 230.0
"""SVG units, which are matplotlib's points."""

FONT_SIZE = 12.5
SMALL = 10.5
_POINTS_PER_INCH = 72
_PANEL_INCHES = (6.0, 4.0)
_DPI = 150


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with one pair of axes, not yet drawn."""

    name: str
    """Part of identifiers; differs from the other charts of a section or file."""

    title: str
    note: str
    """What the values are, in a few words; may be empty."""

    description: str
    """The first and last values as text, for screen readers."""

    draw: Callable[[Axes], None]
    height: float = HEIGHT


type Legend = Sequence[tuple[str, Style]]


def series_legend(labels: Iterable[str]) -> Legend:
    """The legend of series in the order of their styles."""
    return [(label, series_style(index)) for index, label in enumerate(labels)]


# ---- axes -------------------------------------------------------------------------------------


def prepare_axes(axes: Axes) -> None:
    """Remove the frame, set fonts and grid."""
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(labelsize=FONT_SIZE, colors=QUIET, length=3)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)


def set_count_axis(axes: Axes, name: str, last: float, *, first: float = 0) -> None:
    """Integers from `first` to `last` on the x axis."""
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label_x_axis(axes, name)


def label_x_axis(axes: Axes, name: str) -> None:
    """The name of the x axis, at its right end."""
    axes.set_xlabel(name, fontsize=FONT_SIZE, color=QUIET, loc="right", labelpad=1)


def set_value_axis(axes: Axes, *, percent: bool = False) -> None:
    """About five short numbers on the y axis."""
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    numbers = FuncFormatter(lambda value, _: decimal(value, ",.6g"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %") if percent else numbers)


def reference_line(axes: Axes, value: float) -> None:
    """A thin horizontal line behind the data."""
    axes.axhline(value, color=QUIET, linewidth=1, zorder=0.5)


# ---- files ------------------------------------------------------------------------------------


def save_charts(
    charts: Sequence[Chart],
    path: Path,
    *,
    location: str = "training.output",
    title: str = "",
    legend: Legend = (),
    footnote: str = "",
    columns: int = 2,
) -> None:
    """Write charts as one file; a column of a PNG is 900 pixels wide.

    Args:
        charts: in rows from the left.
        path: `.png` or `.svg`; the file appears complete or not at all.
        location: the field that sets the directory, for errors.
        title: above all charts.
        legend: below them, the same for all.
        footnote: what the legend leaves open.
        columns: 1 for a page that is also read on a phone.

    Raises:
        ConfigError: the file cannot be written.
    """
    rows = -(-len(charts) // columns)
    inches = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1])
    figure = _new_figure(inches, dpi=_DPI, pad_inches=0.12)
    figure.suptitle(title, fontsize=FONT_SIZE, color=INK, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False)
    for chart, axes in zip(charts, panels.flat, strict=False):
        prepare_axes(axes)
        axes.set_title(chart.title, loc="left", fontsize=FONT_SIZE, fontweight="bold", color=INK)
        axes.set_title(chart.note, loc="right", fontsize=SMALL, color=QUIET)
        chart.draw(axes)
    for axes in figure.axes[len(charts) :]:
        axes.set_visible(False)
    if legend:
        figure.legend(
            handles=[Line2D([], [], **style.line(marked=False)) for _, style in legend],
            labels=[label.replace("$", r"\$") for label, _ in legend],
            title=footnote,
            title_fontproperties={"size": SMALL},
            loc="outside lower center",
            ncols=3 * columns,
            frameon=False,
            fontsize=FONT_SIZE,
        )
    failed, remedy = f"cannot write {path}", "name a directory to write to"
    with _ignore_missing_glyphs(), ConfigError.on_os_error(location, failed, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, concurrent=True) as temporary:
            figure.savefig(temporary, format=path.suffix[1:])


def _new_figure(inches: tuple[float, float], *, dpi: float, pad_inches: float) -> Figure:
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=pad_inches, h_pad=pad_inches)  # type: ignore[call-arg]
    return figure


# ---- pages ------------------------------------------------------------------------------------


def chart_svg(chart: Chart, prefix: str) -> str:
    """The chart as an `<svg>` element.

    Args:
        chart: drawn in the colors of `style.py`.
        prefix: begins all identifiers, followed by the chart's name.
    """
    inches = (WIDTH / _POINTS_PER_INCH, chart.height / _POINTS_PER_INCH)
    figure = _new_figure(inches, dpi=_POINTS_PER_INCH, pad_inches=2 / _POINTS_PER_INCH)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    prepare_axes(axes)
    chart.draw(axes)
    name = f"{prefix}-{chart.name}"
    text = StringIO()
    # Text stays text, in the page's font; a fixed salt makes identifiers reproducible.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _ignore_missing_glyphs():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    head = (
        f'<svg class="chart" viewBox="{view[1]}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(chart.title)}</title>'
        f'<desc id="{name}-desc">{escape(chart.description)}</desc>'
    )
    return f"{head}{_adapt_to_page(body, name)}</svg>"


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """No warning about letters that matplotlib's font lacks: pages use their own fonts."""
    with catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _adapt_to_page(body: str, name: str) -> str:
    """Unique identifiers, CSS colors, the page's font, coordinates with two digits."""
    referenced = {
        one or other for one, other in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', body)
    }

    def identifier(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in referenced else ""

    body = re.sub(r'\s+id="([^"]+)"', identifier, body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', body)
    # matplotlib writes the font in one of these two ways, depending on its version.
    body = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family:[^;\"]*;? ?", "", body)
    # Only within tags: labels may contain numbers and color codes.
    body = re.sub(r"<[^>]*>", lambda tag: _adapt_tag(tag[0]), body)
    return re.sub(r">\s+<", "><", body).strip()


def _adapt_tag(tag: str) -> str:
    tag = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", tag)
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda match: css_color(match[0]) if match[0] in VARIABLES else match[0],
        tag,
    )
