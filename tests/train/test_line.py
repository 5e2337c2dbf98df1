"""The line of a step or an evaluation."""

import math

import pytest

from megatron_idpo.train.logging.line import evaluation_line, format_accuracy, training_line

VALUES = {
    "loss": 0.62134,
    "final_loss": 0.62,
    "layer_22/loss": 0.64,
    "rewards/margins": 0.2104,
    "rewards/accuracies": 0.7142,
    "grad_norm": 1.3249,
    "learning_rate": 5e-5,
    "throughput/tokens_per_s": 3123.0,
    "throughput/pairs_per_s": 12.31,
    "throughput/row_fill": 0.9712,
    "memory/peak_gb": 5.21,
    "throughput/mfu": 0.413,
}
FULL = (
    "step  20/200 | loss 0.6213 (L22 0.64, final 0.62) | margin +0.210 acc 0.71 | "
    "grad 1.32 lr 5.0e-05 | 3.1k tok/s 12.3 pairs/s 97% full | 5.2 GB MFU 41% | eta 3:12"
)


def test_line_has_all_parts_if_it_fits():
    assert training_line(20, 200, VALUES, eta_s=192.3) == FULL
    assert training_line(20, 200, VALUES, eta_s=192.3, width=len(FULL)) == FULL


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            140,
            "step  20/200 | loss 0.6213 (L22 0.64, final 0.62) | margin +0.210 acc 0.71 | "
            "grad 1.32 lr 5.0e-05 | 3.1k tok/s | MFU 41% | eta 3:12",
        ),
        (
            120,
            "step  20/200 | loss 0.6213 (L22 0.64, final 0.62) | margin +0.210 acc 0.71 | "
            "grad 1.32 | 3.1k tok/s | MFU 41% | eta 3:12",
        ),
        (80, "step  20/200 | loss 0.6213 | margin +0.210 acc 0.71 | 3.1k tok/s | eta 3:12"),
        (60, "step  20/200 | loss 0.6213 | margin +0.210 acc 0.71"),
        (10, "step  20/200 | loss 0.6213 | margin +0.210 acc 0.71"),
    ],
)
def test_narrow_line_drops_parts(width, line):
    assert training_line(20, 200, VALUES, eta_s=192.3, width=width) == line


def test_lines_are_aligned():
    """Equal quantities are in equal columns."""
    first = training_line(1, 200, {**VALUES, "rewards/margins": -0.0001, "loss": 0.693})
    assert len(first) == len(training_line(199, 200, VALUES))


def test_plain_dpo_shows_one_loss():
    values = {name: value for name, value in VALUES.items() if "layer" not in name}
    assert "| loss 0.6213 | margin" in training_line(20, 200, values)


def test_many_layers_are_shown_as_a_range():
    values = VALUES | {f"layer_{layer}/loss": 0.5 + layer / 100 for layer in (4, 8, 28)}
    assert "(L4..L28 0.54-0.78, final 0.62)" in training_line(20, 200, values)
    two = VALUES | {"layer_4/loss": 0.5}
    assert "(L4 0.50, L22 0.64, final 0.62)" in training_line(20, 200, two)


def test_small_losses_have_more_digits():
    values = VALUES | {"layer_22/loss": 0.0994, "final_loss": 0.0043}
    assert "(L22 0.099, final 0.004)" in training_line(20, 200, values)


def test_missing_values_are_left_out():
    assert training_line(3, 10, {"loss": math.nan}) == "step  3/10 | loss nan"


EVALUATED = {f"eval_{name}": VALUES[name] for name in list(VALUES)[:5]} | {"eval_pairs": 1040.0}


def test_evaluation_line():
    assert evaluation_line(20, 200, EVALUATED, seconds=3.21) == (
        "eval  20/200 | loss 0.6213 (L22 0.64, final 0.62) | "
        "margin +0.210 acc 0.71 [0.69, 0.74] | 1,040 pairs in 3.2 s"
    )
    assert evaluation_line(20, 200, EVALUATED, seconds=3.21, width=80) == (
        "eval  20/200 | loss 0.6213 | margin +0.210 acc 0.71 [0.69, 0.74]"
    )


def test_margin_within_rounding_is_a_tie():
    """Of 400 equal pairs a few differ in the last digit, which is not an accuracy of 1 %."""
    for accuracy, margin in ((0.0, -3e-8), (0.01, 2e-7), (0.5, 0.0)):
        assert format_accuracy(accuracy, margin, 400) == "tied"
    assert format_accuracy(0.0, -0.01, 400).startswith("0.00 [0.00")
    assert format_accuracy(0.6, 2e-4, None) == "0.60"


def test_accuracy_before_training_is_tied():
    values = EVALUATED | {"eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.0}
    assert "margin +0.000 acc tied |" in evaluation_line(0, 200, values, seconds=1.0)
    assert format_accuracy(0.0, -0.5, 40) == "0.00 [0.00, 0.09]"
    assert format_accuracy(0.5, None, None) == "0.50"
