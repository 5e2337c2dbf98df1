"""Figures in rows and columns."""

from pathlib import Path

from megatron_idpo.evaluate.report.charts_evaluation import duels_of, layer_lines
from megatron_idpo.evaluate.report.headline_speed import Fact
from megatron_idpo.evaluate.report.inputs import find
from megatron_idpo.evaluate.report.tables import (
    Cell,
    all_layers_table,
    curriculum_table,
    duels_table,
    facts_table,
    final_layers_table,
    h4_table,
    layers_table,
    sources_table,
)

from ...sdpo.tiny_manifest import manifest
from .shown_runs import write_duel, write_h4, write_likelihood, write_run, write_steps


def test_layers_at_the_end_of_training(tmp_path: Path) -> None:
    table = layers_table(find([write_run(tmp_path / "run")]))
    assert table is not None and table.heads[0] == "Last evaluation, held-out pairs"
    final = [Cell("0.3133"), Cell("+1.000"), Cell("0.75", "0.60 to 0.86")]  # ln(1 + 1/e)
    assert dict(table.rows)["final layer"] == final
    assert dict(table.rows)["layer 2"][1] == Cell("+0.500")


def test_without_held_out_pairs_it_is_the_last_step(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", layers=())
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(line for line in lines if "eval_" not in line))
    table = layers_table(find([root]))
    assert table is not None and table.heads[0] == "Last logged step"
    assert [name for name, _ in table.rows] == ["final layer"]


def test_curves_in_figures(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    lines = layer_lines(find([tmp_path]))
    table = final_layers_table(lines)
    assert dict(table.rows)["trained"][:2] == [
        Cell("0.700", "0.680 to 0.720"),
        Cell("+0.700", "+0.680 to +0.720"),
    ]
    assert [name for name, _ in all_layers_table(lines[0]).rows] == ["1", "2", "3", "4"]


def test_win_rates(tmp_path: Path) -> None:
    write_duel(tmp_path, "new", "old", ["aa"] * 11 + ["bb", "--"])
    ((name, cells),) = duels_table(duels_of(find([tmp_path]))).rows
    assert name == "new against old"
    assert [cell.value for cell in cells] == ["91.7 %", "11", "1", "0", "1", "0.006", "some-judge"]
    write_duel(tmp_path, "new", "old", ["--"])
    ((_, cells),) = duels_table(duels_of(find([tmp_path]))).rows
    assert cells[0] == Cell("–"), "nothing was judged"


def test_h4(tmp_path: Path) -> None:
    write_h4(tmp_path, "trained")
    write_h4(tmp_path, "part", tasks={"mmlu": {"value": 0.3}, "mine": {"value": None}}, mean=None)
    table = h4_table(find([tmp_path])[0].evaluation.h4)
    assert table.heads == ["Model", "ARC", "HellaSwag", "MMLU", "TruthfulQA", "mine", "H4"]
    rows = dict(table.rows)
    assert rows["trained"][0] == Cell("25.00", "± 1.00")
    assert rows["trained"][-1] == Cell("62.50", "± 0.50")
    assert [cell.value for cell in rows["part"]] == ["–", "–", "30.00", "–", "–", "–"]


def test_steps(tmp_path: Path) -> None:
    (run,) = find([write_steps(tmp_path / "run", manifest("complete", "pending"))])
    rows = dict(curriculum_table(run).rows)
    assert rows["1"][:3] == [Cell("complete"), Cell("1,000"), Cell("0.75", "0.60 to 0.86")]
    assert rows["2"][2:] == [Cell("–")] * 4
    assert dict(sources_table(run).rows)["data/hard.jsonl"] == [
        Cell("40.0 %"),
        Cell("100"),
        Cell("1,100"),
    ]


def test_what_only_one_run_has_is_a_dash_for_the_other() -> None:
    table = facts_table({"a": [Fact("x", "1", "note")], "b": [Fact("y", "2")]})
    assert table.heads == ["", "a", "b"]
    assert table.rows == [
        ("x", [Cell("1", "note"), Cell("–")]),
        ("y", [Cell("–"), Cell("2")]),
    ]
