"""The tables of the page."""

from pathlib import Path

from megatron_idpo.evaluate.report.inputs import Comparison, read_runs
from megatron_idpo.evaluate.report.tables import (
    Cell,
    all_layers_table,
    curriculum_table,
    facts_table,
    final_layers_table,
    h4_table,
    layers_table,
    sources_table,
    wins_table,
)
from tests.sdpo.tiny_manifest import manifest

from .example_runs import write_comparison, write_h4, write_likelihood, write_run, write_steps


def by_title(root: Path) -> dict[str, Comparison]:
    return {f"{one.a} against {one.b}": one for one in read_runs([root])[0].evaluation.comparisons}


def test_layers_on_held_out_pairs(tmp_path: Path) -> None:
    table = layers_table(read_runs([write_run(tmp_path / "run")]))
    assert table.heads[0] == "Last evaluation, held-out pairs"
    final = [Cell("0.3133"), Cell("+1.000"), Cell("0.75", "0.60 to 0.86")]  # ln(1 + 1/e)
    assert dict(table.rows)["final layer"] == final
    assert dict(table.rows)["layer 2"][1] == Cell("+0.500")


def test_layers_at_the_last_step_without_held_out_pairs(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", layers=())
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(line for line in lines if "eval_" not in line))
    table = layers_table(read_runs([root]))
    assert table.heads[0] == "Last logged step"
    assert [name for name, _ in table.rows] == ["final layer"]


def test_layer_curves(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    models = read_runs([tmp_path])[0].evaluation.curves
    table = final_layers_table(models)
    assert dict(table.rows)["trained"][:2] == [
        Cell("0.700", "0.680 to 0.720"),
        Cell("+0.700", "+0.680 to +0.720"),
    ]
    assert [name for name, _ in all_layers_table(models["base"]).rows] == ["1", "2", "3", "4"]


def test_win_rates(tmp_path: Path) -> None:
    write_comparison(tmp_path, "new", "old", ["aa"] * 11 + ["bb", "--"])
    ((name, cells),) = wins_table(by_title(tmp_path)).rows
    assert name == "new against old"
    assert [cell.value for cell in cells] == ["91.7 %", "11", "1", "0", "1", "0.006", "some-judge"]
    write_comparison(tmp_path, "new", "old", ["--"])
    ((_, cells),) = wins_table(by_title(tmp_path)).rows
    assert cells[0] == Cell("–"), "no verdict"


def test_h4(tmp_path: Path) -> None:
    write_h4(tmp_path, "part", {"mmlu": 0.3})
    models = read_runs([tmp_path])[0].evaluation.h4
    assert h4_table(models).heads == ["Model", "MMLU", "H4"]
    write_h4(tmp_path, "trained")
    table = h4_table(read_runs([tmp_path])[0].evaluation.h4)
    assert table.heads == ["Model", "ARC", "HellaSwag", "MMLU", "TruthfulQA", "H4"]
    rows = dict(table.rows)
    assert rows["trained"][0] == Cell("25.00", "± 1.00")
    assert rows["trained"][-1] == Cell("62.50", "± 0.50")
    assert [cell.value for cell in rows["part"]] == ["–", "–", "30.00", "–", "–"]


def test_sdpo_steps(tmp_path: Path) -> None:
    (run,) = read_runs([write_steps(tmp_path / "run", manifest("complete", "pending"))])
    assert run.manifest is not None
    rows = dict(curriculum_table(run.manifest).rows)
    assert rows["1"][:3] == [Cell("complete"), Cell("1,000"), Cell("0.75 [0.60, 0.86]")]
    assert rows["2"][2:] == [Cell("–")] * 4
    assert dict(sources_table(run.manifest).rows)["data/hard.jsonl"] == [
        Cell("40.0 %"),
        Cell("100"),
        Cell("1,100"),
    ]


def test_fact_of_one_run_is_a_dash_for_the_other() -> None:
    table = facts_table({"a": {"x": Cell("1", "note")}, "b": {"y": Cell("2")}})
    assert table.heads == ["", "a", "b"]
    assert table.rows == [("x", [Cell("1", "note"), Cell("–")]), ("y", [Cell("–"), Cell("2")])]
