"""A chart in a page: its own names, the page's colours, nothing from outside."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_idpo.evaluate.report.charts import (
    FINAL,
    INK,
    Style,
    colour_variables,
    count_axis,
    key_svg,
    layer_styles,
    new_chart,
    series_style,
    to_svg,
    value_axis,
)


def drawn(name: str = "one", **words: str) -> str:
    figure, axes = new_chart()
    style = series_style(1)
    axes.plot([0, 50, 100], [-1.5, 1, 2], color=style.colour, linestyle=style.linestyle, marker="s")
    axes.fill_between([0, 100], [0, 0], [1, 1], color=next(iter(layer_styles([7]).values())).colour)
    axes.text(3, 1, "$x$ <b> & 日本", color=INK, parse_math=False)
    count_axis(axes, "step", 100)
    value_axis(axes)
    return to_svg(figure, name, **{"title": "Loss", "description": "falls", **words})


def test_it_is_well_formed_and_says_what_it_is() -> None:
    root = ElementTree.fromstring(drawn(title="a < b", description='"c" & d'))
    assert root.get("role") == "img"
    assert root.get("viewBox") == "0 0 400 230"
    assert root.get("width") is None, "the page says how wide it is"
    names = root.get("aria-labelledby", "").split()
    texts = {element.get("id"): element.text for element in root}
    assert [texts[name] for name in names] == ["a < b", '"c" & d']


def test_colours_are_the_pages() -> None:
    svg = drawn()
    assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that no dark page could change"
    used = set(re.findall(r"var\(--([a-z]+-\d+|[a-z]+)\)", svg))
    assert used == {"ink", "quiet", "grid", "series-1", "layer-5"}
    for dark in (False, True):
        defined = dict(re.findall(r"--([a-z]+-\d+): (#[0-9a-f]{6});", colour_variables(dark=dark)))
        assert {"series-1", "layer-5"} <= defined.keys()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#rrggbb`."""
    parts = [int(colour[location : location + 2], 16) / 255 for location in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("dark", "paper"), [(False, "#ffffff"), (True, "#15171a")])
def test_every_colour_stands_out_from_the_page(dark: bool, paper: str) -> None:
    """WCAG 2.1 asks 3 : 1 of what is to be seen in a picture."""
    for colour in re.findall(r"#[0-9a-f]{6}", colour_variables(dark=dark)):
        bright, dim = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3, colour


def test_series_differ_without_their_colours() -> None:
    for styles in ([series_style(n) for n in range(6)], list(layer_styles(range(1, 7)).values())):
        assert len({(style.dashes, style.marker) for style in styles}) == 6
        assert len({style.colour for style in styles}) == 6
    assert (FINAL.dashes, FINAL.marker) not in {
        (style.dashes, style.marker) for style in layer_styles(range(1, 7)).values()
    }


def test_names_within_are_the_charts_own() -> None:
    svg = drawn("mine")
    identifiers = re.findall(r'\bid="([^"]+)"', svg)
    assert identifiers and all(name.startswith("mine-") for name in identifiers)
    referred = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    names = {one or other for one, other in referred}
    assert names and names <= set(identifiers)
    assert not set(identifiers) & set(re.findall(r'\bid="([^"]+)"', drawn("other")))


def test_nothing_comes_from_outside_and_nothing_is_styled_but_the_chart() -> None:
    svg = drawn()
    assert "http" not in svg and "<style" not in svg and "DejaVu" not in svg
    assert "−1" in svg and "$x$ &lt;b&gt; &amp; 日本" in svg


def test_the_same_chart_is_the_same_text() -> None:
    assert drawn() == drawn()


@pytest.mark.filterwarnings("error")
def test_letters_that_matplotlib_lacks_are_no_warning() -> None:
    drawn()


def test_a_key_is_drawn_as_its_series() -> None:
    key = key_svg(Style(INK, (6, 2.5), "s"))
    assert "var(--ink)" in key and 'stroke-dasharray="6 2.5"' in key and "<rect" in key
    ElementTree.fromstring(key)
