"""Ranking of layers: agreement times headroom, and its reasons."""

from pathlib import Path

import numpy as np
import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.likelihood.advise import (
    advice_markdown,
    format_best_layers,
    main,
    rank_layers,
)
from megatron_idpo.evaluate.likelihood.curves_file import write_curves, write_settings
from megatron_idpo.evaluate.likelihood.layer_curves import QUANTITIES, Estimate, LayerCurves
from megatron_idpo.evaluate.models import EvalModel


def curves(
    likelihood: list[float],
    agreement: list[float],
    *,
    nats: list[float] | None = None,
    width: float = 0.05,
    name: str = "dpo",
) -> LayerCurves:
    """Curves of a model whose layers are all readable, unless `nats` is given; chance is 5 nats."""
    nothing = np.zeros(len(likelihood))
    estimates = {quantity: Estimate(nothing, nothing, nothing) for quantity in QUANTITIES}
    for quantity, values in (("likelihood", likelihood), ("agreement", agreement)):
        value_L = np.array(values)
        estimates[quantity] = Estimate(value_L, value_L - width, value_L + width)
    if nats is not None:
        estimates["nats_per_token"] = Estimate(np.array(nats), nothing, nothing)
    return LayerCurves(name, tuple(range(1, len(likelihood) + 1)), 200, 40, 5.0, estimates)


def test_score_is_agreement_times_headroom() -> None:
    """Expected scores: 0.1 x 1, 0.6 x 0.9, 0.9 x 0.5, 0.95 x 0.1."""
    found = rank_layers(curves([0.5, 0.52, 0.6, 0.68, 0.7], [0.1, 0.6, 0.9, 0.95, 1.0]))
    assert [advice.layer for advice in found] == [2, 3, 1, 4]
    assert [round(advice.score, 3) for advice in found] == [0.54, 0.45, 0.1, 0.095]
    assert found[0].reason == "agreement 0.60 with the final layer, 10% of its gain in likelihood"


def test_insignificant_agreement_scores_0() -> None:
    found = rank_layers(curves([0.5, 0.5, 0.7], [0.04, 0.3, 1.0], width=0.2))
    assert [advice.layer for advice in found] == [2, 1]
    assert found[1].score == 0.0
    assert "no significant agreement" in found[1].reason


def test_too_few_prompts_give_no_advice() -> None:
    few = curves([0.5, 0.6, 0.7], [0.5, 0.9, 1.0], width=np.nan)
    assert {advice.reason for advice in rank_layers(few)} == {"too few prompts"}
    assert list(format_best_layers([few])) == ["dpo: no advice, too few prompts"]


def test_few_prompts_are_not_a_reason_against_a_tap() -> None:
    """An interval from -0.6 to 0.8 excludes neither agreement nor its absence."""
    (verdict,) = format_best_layers([curves([0.5, 0.6, 0.7], [0.1, 0.1, 1.0], width=0.7)])
    assert verdict == (
        "dpo: no advice: on 40 prompts no layer's agreement with the final layer is significant; "
        "evaluate more pairs"
    )
    (verdict,) = format_best_layers([curves([0.5, 0.6, 0.7], [0.1, 0.1, 1.0], width=0.11)])
    assert "evaluate more pairs" in verdict  # up to 0.21


def test_intervals_without_a_useful_agreement_advise_against_a_tap() -> None:
    disagreeing = curves([0.5, 0.6, 0.7], [0.0, -0.1, 1.0], width=0.1)
    assert "at most 0.10" in rank_layers(disagreeing)[1].reason
    (verdict,) = format_best_layers([disagreeing])
    assert verdict.startswith("dpo: no layer agrees with the final layer; do not tap")


def test_unreadable_layers_come_last() -> None:
    found = rank_layers(
        curves([0.5, 0.5, 0.6, 0.7], [0.9, 0.9, 0.3, 1.0], nats=[15.0, 5.1, 4.9, 2.5])
    )
    assert [advice.layer for advice in found] == [3, 2, 1]
    assert [round(advice.score, 3) for advice in found] == [0.15, 0.0, 0.0]
    assert found[1].reason == "not readable by the head: 5.1 nats per token, chance is 5.0"


def test_without_a_gain_headroom_is_the_share_of_layers_above() -> None:
    """The reference itself (0.5 everywhere), and a model without a significant gain."""
    for likelihood in ([0.5] * 4, [0.5, 0.5, 0.51, 0.53]):
        found = rank_layers(curves(likelihood, [0.2, 0.6, 0.8, 1.0]))
        assert [round(advice.score, 3) for advice in found] == [0.3, 0.2, 0.15]
        assert "50% of the layers are above" in found[0].reason


def test_layer_with_more_gain_than_the_final_layer_has_no_headroom() -> None:
    found = rank_layers(curves([0.6, 0.8, 0.7], [0.9, 0.9, 1.0]))
    assert [(advice.layer, round(advice.headroom, 3)) for advice in found] == [(1, 0.5), (2, 0.0)]


def test_advice_lists_every_model() -> None:
    several = [
        curves([0.5, 0.6, 0.7], [0.5, 0.9, 1.0]),
        curves([0.5, 0.5, 0.5], [0.0, 0.0, 1.0], name="odd"),
    ]
    first, second = format_best_layers(several)
    assert first.startswith("dpo: suggested layers to tap: 1, 2;")
    assert second.startswith("odd: no layer agrees with the final layer")
    text = advice_markdown(several)
    assert text.count("\n1. layer") == 1 and text.endswith(f"{second}\n")


def test_layers_that_no_head_can_read_are_not_ranked() -> None:
    unreadable = curves([0.5] * 4, [0.9, 0.9, 0.9, 1.0], nats=[15.0, 9.1, 5.4, 2.5])
    (verdict,) = format_best_layers([unreadable])
    assert "reads no layer" in verdict and "layer 3, 5.4 nats per token, chance is 5.0" in verdict
    assert "1. layer" not in advice_markdown([unreadable])


def test_layers_that_cannot_be_tapped_are_listed_apart() -> None:
    mixed = curves([0.5, 0.52, 0.6, 0.7], [0.1, 0.6, 0.9, 1.0], nats=[9.0, 4.0, 3.0, 2.5])
    ranking, _, others = advice_markdown([mixed]).partition("Not ranked:")
    assert "1. layer 2" in ranking and "layer 1 " not in ranking
    assert "- layer 1: not readable by the head" in others and "- layer 2" not in others


def test_verb_prints_the_ranking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"evaluate: {{output: {tmp_path / 'out'}}}\n")
    with pytest.raises(DataError, match=rf"first run: megatron-idpo likelihood {file}"):
        main(file, [])
    directory = tmp_path / "out" / "likelihood"
    write_curves(
        directory / "likelihood.csv", [curves([0.5, 0.52, 0.6, 0.7], [0.1, 0.6, 0.9, 1.0])]
    )
    config = load_config(file, ["model.path=sft", "data.train=t"], optional=SECTIONS)
    write_settings(directory, config, [EvalModel("dpo", "runs/dpo/hf")], {})
    assert main(file, []) == 0
    message = capsys.readouterr().out
    assert message.startswith("reference: sft, beta 0.1\n")
    with pytest.raises(DataError, match="has the curves of dpo, not of sft; run `likelihood`"):
        main(file, ["evaluate.models={sft: x}"])
    assert "1. layer 2 (depth 0.50), score 0.540: agreement 0.60" in message
