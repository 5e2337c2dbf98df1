"""The figure of an sDPO run: pairs by source, the first model, results against both references."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_idpo.errors import ConfigError
from megatron_idpo.figures.evaluation import REFERENCES, result_charts
from megatron_idpo.sdpo.curriculum_figure import curriculum_of, draw_curriculum
from megatron_idpo.sdpo.manifest import FIRST, Manifest
from megatron_idpo.train.metrics.intervals import wilson_interval
from tests.sdpo.tiny_manifest import SOURCES, manifest, metrics, record


def test_data_panels_show_pairs_and_accuracy_by_source(
    tmp_path: Path, saved_figures: list[Figure]
) -> None:
    draw_curriculum(manifest("complete", "complete", "pending"), tmp_path / "c.png")
    (figure,) = saved_figures
    pairs, first, *_ = figure.axes
    heights = [[bar.get_height() for bar in container] for container in pairs.containers]
    assert heights == [[900, 900, 900], [100, 1100, 2100]]
    tops = [bar.get_y() + bar.get_height() for bar in pairs.containers[-1]]
    assert tops == [1000, 2000, 3000]
    legend = pairs.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == list(SOURCES)
    assert [bar.get_width() for bar in first.patches] == [0.8, 0.4]
    assert [text.get_text() for text in first.get_yticklabels()] == list(SOURCES)
    assert first.get_xlim() == (0, 1)
    colors = [container[0].get_facecolor() for container in pairs.containers]
    assert colors == [bar.get_facecolor() for bar in first.patches]
    assert colors[0] != colors[1]


def test_result_panels_show_both_references(tmp_path: Path, saved_figures: list[Figure]) -> None:
    draw_curriculum(manifest("complete", "complete", "pending"), tmp_path / "c.png")
    (figure,) = saved_figures
    _, _, accuracy, margin = figure.axes
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["Pairs", "First model", "Reward accuracy", "Reward margin"]
    own, first = (line for line in margin.lines if line.get_marker() == "o")
    assert [list(line.get_ydata()) for line in (own, first)] == [[0.125, 0.25], [0.25, 0.5]]
    assert [round(float(x)) for x in own.get_xdata()] == [1, 2]
    assert own.get_color() != first.get_color()
    bars = [path.vertices[:, 1].tolist() for c in accuracy.collections for path in c.get_paths()]
    assert bars == [list(wilson_interval(0.75, 40))] * 4
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [label for label, _ in REFERENCES]


def test_results_are_within_the_axes(tmp_path: Path, saved_figures: list[Figure]) -> None:
    steps = tuple(
        record(index, "complete", metrics=metrics(accuracy, -5.0, 10))
        for index, accuracy in enumerate((0.0, 0.1, 1.0), 1)
    )
    draw_curriculum(manifest(steps=steps), tmp_path / "c.png")
    for axes in saved_figures[0].axes[2:]:
        low, high = axes.get_ylim()
        values = [float(y) for line in axes.lines for y in line.get_ydata()]
        assert low <= min(values) and max(values) <= high


def test_descriptions_list_the_values() -> None:
    accuracy, margin = result_charts(curriculum_of(manifest("complete", "complete", "pending")))
    assert (accuracy.title, margin.title) == ("Reward accuracy", "Reward margin")
    assert "against its own reference: step 1 0.125, step 2 0.250" in margin.description
    assert "against the first model: step 1 0.250, step 2 0.500" in margin.description


def test_tied_step_has_a_margin_but_no_accuracy() -> None:
    tied = record(1, "complete", metrics=metrics(0.0, 0.0))
    steps = (tied, record(2, "complete"))
    accuracy, margin = result_charts(curriculum_of(manifest(steps=steps)))
    assert "step 1" not in accuracy.description
    assert "step 1 0.000" in margin.description


def test_no_result_charts_without_results() -> None:
    assert result_charts(curriculum_of(manifest("training", "pending"))) == []


NAMES = {f"data/{'sub/' * depth}pairs-{depth}.jsonl": 1 / (depth + 2) for depth in range(12)}
RUNS: dict[str, Manifest] = {
    "not started": manifest("pending"),
    "one step of one source": manifest(
        steps=(record(1, "complete", sources={SOURCES[0]: 5}),), accuracy={SOURCES[0]: 0.5}
    ),
    "no held-out pairs": manifest(steps=(record(1, "complete", metrics={}), record(2, "training"))),
    "metrics against one reference": manifest(
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
def test_any_run_can_be_drawn(tmp_path: Path, saved_figures: list[Figure], run: Manifest) -> None:
    draw_curriculum(run, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert len(saved_figures[0].axes[0].containers) == len(run.accuracy)


@pytest.mark.parametrize(
    ("source", "label"),
    [("x" * 40 + "/b.jsonl", "…" + "x" * 19 + "/b.jsonl"), ("a$^b$.jsonl", r"a\$^b\$.jsonl")],
    ids=["long path keeps its end", "dollar sign is escaped"],
)
def test_source_labels(
    tmp_path: Path, saved_figures: list[Figure], source: str, label: str
) -> None:
    run = manifest(steps=(record(1, sources={source: 5}),), accuracy={source: 0.5})
    draw_curriculum(run, tmp_path / "c.png")
    assert [text.get_text() for text in saved_figures[0].axes[1].get_yticklabels()] == [label]


def test_unwritable_figure_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"training\.output: cannot write .*file/c\.png: .*; name a directory"
    with pytest.raises(ConfigError, match=message):
        draw_curriculum(manifest("pending"), tmp_path / "file" / "c.png")
