"""The steps of sDPO as charts."""

import re

from megatron_idpo.evaluate.report.charts_curriculum import curriculum_charts

from ...sdpo.tiny_manifest import manifest, metrics, record


def test_accuracy_and_margin_against_both_references() -> None:
    accuracy, margin = curriculum_charts(manifest("complete", "complete", "pending"), "it")
    assert (accuracy.title, margin.title) == ("Reward accuracy", "Reward margin")
    assert "against its own reference: step 1 0.125, step 2 0.250" in margin.svg
    assert "against the first model: step 1 0.250, step 2 0.500" in margin.svg
    assert re.findall(r"<text[^>]*>(step \d)</text>", margin.svg) == ["step 1", "step 2", "step 3"]


def test_a_tied_step_has_a_margin_but_no_accuracy() -> None:
    tied = record(1, "complete", metrics=metrics(0.0, 0.0))
    accuracy, margin = curriculum_charts(manifest(steps=(tied, record(2, "complete"))), "it")
    assert "step 1" not in re.findall(r"<desc[^>]*>(.*?)</desc>", accuracy.svg)[0]
    assert "step 1 0.000" in margin.svg


def test_nothing_was_measured() -> None:
    assert curriculum_charts(manifest("training", "pending"), "it") == []
