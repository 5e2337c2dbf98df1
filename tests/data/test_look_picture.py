"""The picture: a PNG whose lines are the data's, for ordinary and for strange lengths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from megatron_idpo.data.inspect.statistics import RowFigures
from megatron_idpo.errors import ConfigError
from megatron_idpo.figures.data_lengths import PARTS, save_picture

PNG = b"\x89PNG\r\n\x1a\n"


def figures(used: list[int], row_tokens: int = 100) -> RowFigures:
    used_R = np.array(used)
    return RowFigures(
        steps=1,
        left_over_pairs=0,
        rows_S=np.array([len(used)]),
        length_S=np.array([row_tokens]),
        pairs_R=np.ones_like(used_R),
        used_R=used_R,
        positions_R=np.full_like(used_R, row_tokens),
    )


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
    lengths_P3 = np.random.default_rng(0).integers(1, 500, (300, 3))
    path = tmp_path / "new" / "data.png"
    save_picture(path, lengths_P3, figures([90, 95, 100, 40]), "some pairs")
    assert path.read_bytes().startswith(PNG)
    lengths_axes, fill_axes = drawn[0].axes
    message = [text.get_text() for text in lengths_axes.get_legend().get_texts()]
    medians = np.quantile(lengths_P3, 0.5, axis=0, method="inverted_cdf")
    assert message == [f"{name}, median {m}" for (name, *_), m in zip(PARTS, medians, strict=True)]
    assert [int(np.sum(line.get_ydata())) for line in lengths_axes.lines] == [300] * 3
    assert sum(bar.get_height() for bar in fill_axes.patches) == 4
    assert [text.get_text() for text in fill_axes.texts] == ["81.2% overall "]


LENGTH = st.integers(1, 3) | st.integers(1, 2**20)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.tuples(LENGTH, LENGTH, LENGTH), min_size=1, max_size=4),
    used=st.lists(st.integers(0, 100), min_size=1, max_size=4).filter(sum),
)
@pytest.mark.filterwarnings("error")
def test_any_lengths_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[tuple[int, int, int]],
    used: list[int],
) -> None:
    path = tmp_path_factory.mktemp("picture") / "data.png"
    save_picture(path, np.array(lengths), figures(used), "t")
    assert path.read_bytes().startswith(PNG)


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"training\.output: cannot write .*file/data\.png"):
        save_picture(tmp_path / "file" / "data.png", np.ones((1, 3), int), figures([1]), "t")
