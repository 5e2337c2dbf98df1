"""The picture: pairs by source, the first model, each step's result against both references."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from megatron_idpo.errors import ConfigError
from megatron_idpo.figures.curriculum import draw_curriculum
from megatron_idpo.sdpo.manifest import FIRST, Manifest
from megatron_idpo.train.metrics.confidence import wilson_interval

from .tiny_manifest import SOURCES, manifest, metrics, record

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved; drawn small, because only what is in them is looked at."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs, dpi=30)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_what_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curriculum(manifest("complete", "complete", "pending"), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    pairs, first, accuracy, margin = drawn[0].axes
    assert [axes.get_xlabel() for axes in (pairs, accuracy, margin)] == ["step"] * 3
    assert [axes.get_ylabel() for axes in (pairs, accuracy, margin)] == [
        "pairs",
        "accuracy on held-out pairs, 95% interval",
        "reward margin on held-out pairs",
    ]
    bars = [[bar.get_height() for bar in container] for container in pairs.containers]
    assert bars == [[900, 900, 900], [100, 1100, 2100]]
    tops = [bar.get_y() + bar.get_height() for bar in pairs.containers[-1]]
    assert tops == [1000, 2000, 3000]
    legend = pairs.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == list(SOURCES)
    assert [bar.get_width() for bar in first.patches] == [0.8, 0.4]
    assert [text.get_text() for text in first.get_yticklabels()] == list(SOURCES)
    assert first.get_xlim() == (0, 1)
    legend = margin.get_legend()
    against = ["against its own reference", "against the first model"]
    assert legend and [text.get_text() for text in legend.get_texts()] == against


def test_results_are_at_their_steps(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curriculum(manifest("complete", "complete", "pending"), tmp_path / "c.png")
    *_, accuracy, margin = drawn[0].axes
    own, first = (line for line in margin.lines if line.get_marker() == "o")
    assert [list(line.get_ydata()) for line in (own, first)] == [[0.125, 0.25], [0.25, 0.5]]
    assert [round(float(x)) for x in own.get_xdata()] == [1, 2]
    assert own.get_color() != first.get_color()
    intervals = [list(line.get_ydata()) for line in accuracy.lines if len(line.get_ydata()) == 2]
    assert intervals.count(list(wilson_interval(0.75, 40))) == 4


def test_bars_of_a_source_have_its_colour(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curriculum(manifest("pending"), tmp_path / "c.png")
    pairs, first, *_ = drawn[0].axes
    colours = [container[0].get_facecolor() for container in pairs.containers]
    assert colours == [bar.get_facecolor() for bar in first.patches]
    assert colours[0] != colours[1]


def test_no_result_is_outside(tmp_path: Path, drawn: list[Figure]) -> None:
    steps = tuple(
        record(number, "complete", metrics=metrics(accuracy, -5.0, 10))
        for number, accuracy in enumerate((0.0, 0.1, 1.0), 1)
    )
    draw_curriculum(manifest(steps=steps), tmp_path / "c.png")
    for axes in drawn[0].axes[2:]:
        low, high = axes.get_ylim()
        values = [float(y) for line in axes.lines for y in line.get_ydata()]
        assert low <= min(values) and max(values) <= high


NAMES = {f"data/{'sub/' * depth}pairs-{depth}.jsonl": 1 / (depth + 2) for depth in range(12)}
RUNS: dict[str, Manifest] = {
    "nothing yet": manifest("pending"),
    "one step of one source": manifest(
        steps=(record(1, "complete", sources={SOURCES[0]: 5}),), accuracy={SOURCES[0]: 0.5}
    ),
    "no held-out pairs": manifest(steps=(record(1, "complete", metrics={}), record(2, "training"))),
    "figures against one reference": manifest(
        steps=(
            record(
                1,
                "complete",
                metrics={k: v for k, v in metrics(0.5, 0.1).items() if not k.startswith(FIRST)},
            ),
        )
    ),
    "many steps and sources": manifest(
        steps=tuple(record(n, "complete", sources={name: n for name in NAMES}) for n in range(40)),
        accuracy=NAMES,
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.filterwarnings("error")
def test_any_run_can_be_drawn(tmp_path: Path, drawn: list[Figure], run: Manifest) -> None:
    draw_curriculum(run, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert len(drawn[0].axes[0].containers) == len(run.accuracy)


def test_a_long_name_keeps_its_end(tmp_path: Path, drawn: list[Figure]) -> None:
    name = "x" * 40 + "/b.jsonl"
    run = manifest(steps=(record(1, sources={name: 5}),), accuracy={name: 0.5})
    draw_curriculum(run, tmp_path / "c.png")
    (message,) = [text.get_text() for text in drawn[0].axes[1].get_yticklabels()]
    assert message.startswith("…x") and message.endswith("x/b.jsonl") and len(message) == 28


def test_a_dollar_sign_is_no_formula(tmp_path: Path, drawn: list[Figure]) -> None:
    odd = manifest("complete", accuracy={"a$^b$.jsonl": 0.5})
    draw_curriculum(odd, tmp_path / "c.png")
    assert drawn[0].axes[1].get_yticklabels()[0].get_text() == r"a\$^b\$.jsonl"


def test_its_size(tmp_path: Path) -> None:
    from matplotlib.image import imread

    draw_curriculum(manifest("complete"), tmp_path / "c.png")
    pixels = imread(tmp_path / "c.png")
    assert pixels.shape[:2] == (1200, 1800)
    for rows in (pixels[:600], pixels[600:]):
        for panel in (rows[:, :900], rows[:, 900:]):
            assert (panel[..., :3] < 1).any(axis=-1).mean() > 0.005  # not an empty sheet


def test_what_cannot_be_written_is_reported(tmp_path: Path) -> None:
    message = r"training\.output: cannot write .*missing/c\.png: No such file.*; name a directory"
    with pytest.raises(ConfigError, match=message):
        draw_curriculum(manifest("pending"), tmp_path / "missing" / "c.png")
