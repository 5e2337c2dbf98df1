"""The figure of prompt and answer lengths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from megatron_idpo.figures.data_lengths import PARTS, draw_data_lengths


def test_histograms_have_all_pairs_and_rows(tmp_path: Path, saved_figures: list[Figure]) -> None:
    lengths_P3 = np.random.default_rng(0).integers(1, 500, (300, 3))
    path = tmp_path / "new" / "data.png"
    draw_data_lengths(path, lengths_P3, np.array([0.9, 0.95, 1.0, 0.4]), 0.8125, title="pairs")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (figure,) = saved_figures
    assert figure.get_suptitle() == "pairs"
    lengths_axes, fill_axes = figure.axes
    legend = lengths_axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    medians = np.quantile(lengths_P3, 0.5, axis=0, method="inverted_cdf")
    assert labels == [f"{name}, median {m}" for name, m in zip(PARTS, medians, strict=True)]
    assert [int(np.sum(line.get_ydata())) for line in lengths_axes.lines] == [300] * 3
    assert sum(bar.get_height() for bar in fill_axes.patches) == 4
    assert fill_axes.get_title("right") == "rows; line: 81.3 % overall"
    assert fill_axes.lines[0].get_xdata()[0] == 81.25


LENGTH = st.integers(1, 3) | st.integers(1, 2**20)


@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.tuples(LENGTH, LENGTH, LENGTH), min_size=1, max_size=4),
    fill=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
@pytest.mark.filterwarnings("error")
def test_any_lengths_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int, int]], fill: list[float]
) -> None:
    path = tmp_path_factory.mktemp("figure") / "data.png"
    draw_data_lengths(path, np.array(lengths), np.array(fill), float(np.mean(fill)), title="t")
    assert path.stat().st_size > 1000
