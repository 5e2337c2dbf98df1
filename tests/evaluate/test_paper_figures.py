"""Consistency of the copied figures of the papers."""

from megatron_idpo.evaluate.paper_figures import PAPER_DEPTH, PAPER_H4, PAPER_WINS
from megatron_idpo.objective.layers import resolve_layers

ROUNDING = 0.0051
"""Means are printed with two decimals, of values with two."""


def test_h4_is_the_mean_of_its_tasks() -> None:
    for row in PAPER_H4:
        assert abs(sum(row.values) / 4 - row.mean) < ROUNDING, row


def test_wins_give_the_printed_percentages() -> None:
    assert {row.other: 100 * row.wins / row.prompts for row in PAPER_WINS} == {
        "dpo": 52.5,
        "sft": 67.5,
    }


def test_paper_depth_is_layer_22_of_32() -> None:
    assert resolve_layers((PAPER_DEPTH,), 32) == (22,)
