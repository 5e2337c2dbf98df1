"""Charts in a page (identifiers, colors, no external resources) and in files."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_idpo.errors import ConfigError
from megatron_idpo.figures.chart import (
    Chart,
    chart_svg,
    save_charts,
    set_count_axis,
    set_value_axis,
)
from megatron_idpo.figures.evaluation import win_rate_chart
from megatron_idpo.figures.numbers import interval, shorten
from megatron_idpo.figures.style import (
    FINAL,
    INK,
    Style,
    color_variables,
    key_svg,
    layer_styles,
    sequential_colors,
    series_style,
)


def draw(axes: Axes) -> None:
    style = series_style(1)
    axes.plot([0, 50, 100], [-1.5, 1, 2], **style.line())
    axes.fill_between([0, 100], [0, 0], [1, 1], color=layer_styles([7])[7].color)
    axes.text(3, 1, "$x$ <b> & 日本 0.12345", color=INK, parse_math=False)
    set_count_axis(axes, "step", 100)
    set_value_axis(axes)


CHART = Chart("loss", "Loss", "training", "falls", draw)


@pytest.fixture(scope="module")
def svg() -> str:
    return chart_svg(CHART, "one")


def test_svg_has_accessible_title_and_description() -> None:
    chart = replace(CHART, title="a < b", description='"c" & d')
    root = ElementTree.fromstring(chart_svg(chart, "one"))
    assert root.get("role") == "img"
    assert root.get("viewBox") == "0 0 400 230"
    assert root.get("width") is None, "the page sets the width"
    names = root.get("aria-labelledby", "").split()
    texts = {element.get("id"): element.text for element in root}
    assert [texts[name] for name in names] == ["a < b", '"c" & d']


def test_svg_colors_are_css_variables(svg: str) -> None:
    assert not re.search(r"#[0-9a-f]{6}", svg), "a color that dark pages cannot change"
    used = set(re.findall(r"var\(--([a-z]+-\d+|[a-z]+)\)", svg))
    assert used == {"ink", "quiet", "grid", "series-1", "layer-16"}
    for dark in (False, True):
        defined = dict(re.findall(r"--([a-z]+-\d+): (#[0-9a-f]{6});", color_variables(dark=dark)))
        assert {"series-1", "layer-16"} <= defined.keys()


def luminance(color: str) -> float:
    """WCAG's relative luminance of `#rrggbb`."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("dark", "background"), [(False, "#ffffff"), (True, "#15171a")])
def test_colors_have_contrast_3_to_1(dark: bool, background: str) -> None:
    """WCAG 2.1, graphical objects."""
    for color in re.findall(r"#[0-9a-f]{6}", color_variables(dark=dark)):
        bright, dim = sorted((luminance(color), luminance(background)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3, color


def test_series_differ_without_color() -> None:
    layers = list(layer_styles(range(1, 7)).values())
    for styles in ([series_style(index) for index in range(6)], layers):
        assert len({style.dashes for style in styles}) == 6
        assert len({style.color for style in styles}) == 6
    assert FINAL.dashes not in {style.dashes for style in layers}


def test_sequential_colors_are_distinct() -> None:
    assert len(set(sequential_colors(30))) == 30
    assert len(sequential_colors(1)) == 1 and sequential_colors(0) == []


def test_svg_identifiers_begin_with_the_prefix(svg: str) -> None:
    identifiers = re.findall(r'\bid="([^"]+)"', svg)
    assert identifiers and all(name.startswith("one-loss-") for name in identifiers)
    referenced = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    names = {one or other for one, other in referenced}
    assert names and names <= set(identifiers)
    assert not set(identifiers) & set(re.findall(r'\bid="([^"]+)"', chart_svg(CHART, "other")))


def test_svg_has_no_external_resources_or_styles(svg: str) -> None:
    assert "http" not in svg and "<style" not in svg and "DejaVu" not in svg


def test_svg_keeps_text_and_shortens_coordinates(svg: str) -> None:
    assert "−1" in svg and "$x$ &lt;b&gt; &amp; 日本 0.12345" in svg
    assert not re.search(r'="[^"]*\d\.\d{3}', svg)


def test_svg_is_reproducible(svg: str) -> None:
    assert chart_svg(CHART, "one") == svg


@pytest.mark.filterwarnings("error")
def test_missing_glyphs_do_not_warn() -> None:
    chart_svg(CHART, "one")


def test_legend_key_has_color_and_dashes() -> None:
    key = key_svg(Style(INK, (6, 2.5)))
    assert "var(--ink)" in key and 'stroke-dasharray="6 2.5"' in key
    ElementTree.fromstring(key)


def test_long_win_rate_title_keeps_both_ends(tmp_path: Path, saved_figures: list[Figure]) -> None:
    rates = {"a" * 40 + " against " + "b" * 40: (0.5, 0.4, 0.6), "x": (1.0, 1.0, 1.0)}
    save_charts([win_rate_chart(rates)], tmp_path / "c.svg")
    titles = [text.get_text() for text in saved_figures[0].axes[0].texts]
    assert titles == ["a" * 22 + "…" + "b" * 23, "x"]
    assert shorten("abcdef", 6) == "abcdef" and shorten("abcdefg", 6) == "ab…efg"


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((0.651, 0.9), "0.65 to 0.90"),
        ((-0.1, 0.1), "−0.10 to 0.10"),
        ((float("nan"), 0.5), ""),
        ((0.5, float("inf")), ""),
    ],
)
def test_interval_is_empty_without_both_bounds(bounds: tuple[float, float], text: str) -> None:
    assert interval(*bounds) == text


def test_png_has_two_columns(tmp_path: Path) -> None:
    save_charts([CHART] * 3, tmp_path / "new" / "c.png", title="run")
    pixels = imread(tmp_path / "new" / "c.png")
    assert pixels.shape[:2] == (1200, 1800)
    is_drawn = (pixels[..., :3] < 1).any(axis=-1)
    for rows, columns, expected in (
        (slice(0, 600), slice(0, 900), True),
        (slice(0, 600), slice(900, 1800), True),
        (slice(600, 1200), slice(0, 900), True),
        (slice(600, 1200), slice(900, 1800), False),
    ):
        assert (is_drawn[rows, columns].mean() > 0.005) == expected
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.png"]


def test_png_of_one_column_has_its_charts_below_each_other(tmp_path: Path) -> None:
    save_charts([CHART] * 3, tmp_path / "c.png", columns=1)
    pixels = imread(tmp_path / "c.png")
    assert pixels.shape[:2] == (1800, 900)
    is_drawn = (pixels[..., :3] < 1).any(axis=-1)
    assert all(is_drawn[first : first + 600].mean() > 0.005 for first in (0, 600, 1200))


def test_file_has_titles_notes_and_legend(tmp_path: Path, saved_figures: list[Figure]) -> None:
    legend = [("a$b", series_style(0))]
    save_charts([CHART], tmp_path / "c.svg", title="runs/$x$", legend=legend, footnote="means")
    (figure,) = saved_figures
    assert figure.get_suptitle() == "runs/$x$"
    axes = figure.axes[0]
    assert (axes.get_title("left"), axes.get_title("right")) == ("Loss", "training")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"a\$b"]
    assert figure.legends[0].get_title().get_text() == "means"
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")


def test_unwritable_file_is_reported_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"training\.output: cannot write .*file/c\.png: "):
        save_charts([CHART], tmp_path / "file" / "c.png")
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot write"):
        save_charts([CHART], tmp_path / "file" / "c.png", location="evaluate.output")
