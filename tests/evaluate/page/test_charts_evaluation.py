"""Layer curves and win rates as charts."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_idpo.evaluate.report.charts_evaluation import (
    LEADING,
    duel_chart,
    duels_of,
    layer_charts,
    layer_lines,
)
from megatron_idpo.evaluate.report.inputs import find

from .shown_runs import write_duel, write_likelihood


def test_one_runs_models_by_their_names(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    lines = layer_lines(find([tmp_path]))
    assert [line.label for line in lines] == ["base", "trained"]
    charts = layer_charts(lines, LEADING)
    assert [chart.title for chart in charts] == [
        "Preference likelihood",
        "Reward margin",
        "Reward accuracy",
        "Own accuracy",
    ]
    assert "trained: 0.500 at layer 1, 0.700 (0.680 to 0.720) at layer 4" in charts[0].svg


def test_a_model_that_runs_share_is_there_once(tmp_path: Path) -> None:
    write_likelihood(tmp_path / "a", {"base": 0.5, "trained": 0.7})
    write_likelihood(tmp_path / "b", {"base": 0.5, "trained": 0.6})
    lines = layer_lines(find([tmp_path / "a", tmp_path / "b"]))
    assert [line.label for line in lines] == ["base", "a · trained", "b · trained"]
    assert len({line.style.colour for line in lines}) == 3


def test_what_is_not_known_has_no_chart(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"trained": 0.7})
    path = tmp_path / "likelihood" / "likelihood.csv"
    head, *rows = path.read_text().splitlines()
    columns = head.split(",")
    emptied = [
        ",".join(
            "" if c.startswith("agreement") else v
            for c, v in zip(columns, row.split(","), strict=True)
        )
        for row in rows
    ]
    path.write_text("\n".join([head, *emptied]) + "\n")
    charts = layer_charts(layer_lines(find([tmp_path])), ["agreement", "nats_per_token"])
    assert [chart.title for chart in charts] == ["Nats per token"]


@pytest.mark.filterwarnings("error")
def test_win_rates(tmp_path: Path) -> None:
    write_duel(tmp_path, "new", "old", ["aa", "aa", "bb", "tt"])
    ((title, duel),) = duels_of(find([tmp_path]))
    assert title == "new against old"
    long = f"$x${'x' * 40} against {'y' * 40}"
    chart = duel_chart([(title, duel), (long, replace(duel, low=float("nan")))])
    # (2 + 1/2) / 4
    assert "new against old: 62 % (22 to 91 %)" in chart.svg
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", chart.svg)
    assert {"new against old", "0 %", "50 %", "100 %"} <= set(shown)
    (cut,) = [text for text in shown if "…" in text]
    assert cut.startswith("$x$xxx") and cut.endswith("yyy") and len(cut) <= 46


def test_numbers_in_names_are_shown_as_they_are(tmp_path: Path) -> None:
    write_duel(tmp_path, "lr-0.0005", "lr-0.0001", ["aa"])
    chart = duel_chart(duels_of(find([tmp_path])))
    assert ">lr-0.0005 against lr-0.0001</text>" in chart.svg
    assert not re.search(r'="[^"]*\d\.\d{3}', chart.svg), "but the chart's own are short"


def test_comparisons_of_several_runs_bear_their_names(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_duel(tmp_path / name, "new", "old", ["aa"])
    write_likelihood(tmp_path / "z", {"base": 0.5})
    found = duels_of(find([tmp_path / "x", tmp_path / "y", tmp_path / "z"]))
    assert [title for title, _ in found] == ["x: new against old", "y: new against old"]
    assert duels_of(find([tmp_path / "x", tmp_path / "z"]))[0][0] == "new against old"
