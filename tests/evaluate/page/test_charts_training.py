"""Which lines the charts of training have, and what they say."""

import re
from pathlib import Path

from megatron_idpo.evaluate.report.charts import FINAL
from megatron_idpo.evaluate.report.charts_training import (
    drawn_layers,
    speed_charts,
    training_charts,
    training_lines,
)
from megatron_idpo.evaluate.report.inputs import find

from .shown_runs import write_likelihood, write_run


def described(svg: str) -> str:
    found = re.search(r"<desc[^>]*>(.*?)</desc>", svg)
    assert found is not None
    return found[1]


def test_one_run_has_a_line_for_each_layer(tmp_path: Path) -> None:
    runs = find([write_run(tmp_path / "run", layers=(1, 3))])
    lines = training_lines(runs)
    assert [line.label for line in lines] == ["layer 1", "layer 3", "final layer"]
    assert lines[-1].style == FINAL
    loss, margin, accuracy, norm = training_charts(runs)
    assert loss.note == "each layer's own"
    # 3 of 4 of the final layer's margin, which rises to 1 in 40 steps.
    assert "layer 3: training 0.01875 at step 1, 0.75 at step 40, held-out" in described(margin.svg)
    # Before training all pairs are tied: the first accuracy that means something is at step 20.
    assert "held-out pairs 0.625 at step 20, 0.75 at step 40" in described(accuracy.svg)
    assert accuracy.note == "held out: 95 % intervals of 40 pairs"
    assert described(norm.svg) == "final layer: training 1 at step 1, 1 at step 40"


def test_several_runs_have_a_line_each(tmp_path: Path) -> None:
    roots = [write_run(tmp_path / name, last_margin=m) for name, m in (("a", 1.0), ("b", 0.5))]
    write_likelihood(tmp_path / "c", {"base": 0.5})
    runs = find([roots[0], tmp_path / "c", roots[1]])
    lines = training_lines(runs)
    assert [line.label for line in lines] == ["a", "b"]
    assert len({line.style.colour for line in lines}) == 2
    margin = described(training_charts(runs)[1].svg)
    assert "a: training 0.025 at step 1, 1 at step 40" in margin
    assert "b: training 0.0125 at step 1, 0.5 at step 40" in margin
    assert "layer 2" not in margin
    assert [chart.title for chart in speed_charts(runs)] == ["Tokens per second", "Peak memory"]


def reach(svg: str) -> tuple[float, float]:
    """The highest and the lowest place that lines of the chart come to."""
    shown = re.sub(r"<defs>.*?</defs>", "", svg)  # tick marks and points, drawn elsewhere
    paths = re.findall(r'<path d="([^"]+)"', shown)
    numbers = [float(y) for path in paths for y in re.findall(r"[ML] ?\S+ (\S+)", path)]
    return min(numbers), max(numbers)


def test_no_line_leaves_its_chart(tmp_path: Path) -> None:
    """Lines that are drawn last are the widest here, and intervals reach further than lines."""
    roots = [write_run(tmp_path / name) for name in ("slow", "fast")]
    text = (roots[1] / "metrics.jsonl").read_text()
    text = text.replace('tokens_per_s": 1000', 'tokens_per_s": 9000').replace("40}", "4}")
    (roots[1] / "metrics.jsonl").write_text(text.replace('accuracies": 0.6', 'accuracies": 0.1'))
    runs = find(roots)
    together = [*training_charts(runs), *speed_charts(runs)]
    for chart in (*together, *training_charts(runs[1:])):
        top, bottom = reach(chart.svg)
        ((y, height),) = re.findall(
            r'<rect x="\S+" y="(\S+)" width="\S+" height="(\S+)"/>', chart.svg
        )
        assert top >= float(y) - 1 and bottom <= float(y) + float(height) + 1, chart.title
    for chart in together:  # what is outside of the picture is not drawn at all
        drawn = re.findall(r'<path d="M[^"]+"[^>]*stroke: var\(--series-(\d)', chart.svg)
        assert {"0", "1"} <= set(drawn), chart.title


def test_an_evaluation_has_no_chart_of_training(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5})
    runs = find([tmp_path])
    assert training_charts(runs) == [] and speed_charts(runs) == []


def test_of_many_layers_some_are_drawn() -> None:
    assert drawn_layers([15, 22]) == [15, 22]
    some = drawn_layers(range(1, 32))
    assert len(some) == 6 and some[0] == 1 and some[-1] == 31


def test_a_long_run_has_few_points(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    record = '{"step": %d, "loss": 0.5, "rewards/margins": %f, "grad_norm": 1.0}\n'
    text = "".join(record % (step, (step * 7919 % 1000) / 1000) for step in range(1, 20_001))
    (root / "metrics.jsonl").write_text(text)
    (margin, *_) = [c for c in training_charts(find([root])) if c.title == "Reward margin"]
    assert len(margin.svg) < 12_000
