"""An objective is valid, or all that is wrong with it is told; layers share the loss."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.errors import ConfigError
from megatron_idpo.objective.settings import Objective


@given(st.floats(0, 1), st.lists(st.floats(1e-3, 1e3), max_size=6), st.booleans())
@settings(max_examples=50)
def test_layer_scales_sum_to_one(weight, weights, by_mean):
    given_weights = None if by_mean else tuple(weights)
    objective = Objective(intermediate_weight=weight, layer_weights=given_weights)
    final, scales = objective.layer_scales(len(weights))
    assert final + math.fsum(scales) == pytest.approx(1.0)
    assert len(scales) == len(weights)
    if weights:
        assert final == pytest.approx(1 - weight)


def test_layers_share_by_their_weights():
    objective = Objective(intermediate_weight=0.4, layer_weights=(1.0, 3.0))
    assert objective.layer_scales(2) == (0.6, pytest.approx((0.1, 0.3)))
    assert Objective(intermediate_weight=0.4).layer_scales(2) == (0.6, pytest.approx((0.2, 0.2)))


def test_without_layers_the_weight_counts_as_zero():
    assert Objective(intermediate_weight=0.4).layer_scales(0) == (1.0, ())


def test_weights_for_another_number_of_layers_are_refused():
    for count, message in ((0, "2 weights for 0 layers"), (3, "2 weights for 3 layers")):
        with pytest.raises(
            ConfigError, match=f"objective.layer_weights: {message}; give one weight"
        ):
            Objective(layer_weights=(1.0, 2.0)).layer_scales(count)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", "dpo", "'dpo' is no loss; choose one of sigmoid, ipo, hinge, robust, sigmoid_nor"),
        ("beta", 0.0, "0.0 is not a positive number"),
        ("beta", float("nan"), "nan is not"),
        ("beta", float("inf"), "inf is not"),
        ("label_smoothing", 0.5, r"0.5 is not in \[0, 0.5\)"),
        ("label_smoothing", -0.1, "-0.1 is not"),
        ("nll_weight", -1.0, "-1.0 is negative"),
        ("intermediate_weight", 1.1, r"1.1 is not in \[0, 1\]"),
        ("intermediate_weight", float("nan"), "nan is not"),
        ("layer_weights", (1.0, 0.0), r"\(1.0, 0.0\) are not all positive"),
        ("reference_layer", "last", "'last' is no place to read the reference"),
    ],
)
def test_wrong_fields_are_reported(field, value, message):
    with pytest.raises(ConfigError, match=rf"objective\.{field}: {message}"):
        Objective(**{field: value})


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_smoothing_is_refused_where_it_would_be_ignored(loss):
    with pytest.raises(ConfigError, match=f"0.1 has no meaning for the loss {loss}"):
        Objective(loss=loss, label_smoothing=0.1)


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(ConfigError, match=r"^3 problems"):
        Objective(beta=-1.0, intermediate_weight=2.0, nll_weight=-1.0)


def test_the_limits_of_what_is_right():
    Objective(label_smoothing=0.4999, intermediate_weight=0.0, nll_weight=0.0, beta=1e-9)
    Objective(intermediate_weight=1.0, layer_weights=(), loss="robust", label_smoothing=0.1)
    for loss in ("ipo", "hinge"):
        Objective(loss=loss)


def test_an_unknown_loss_is_not_told_twice():
    with pytest.raises(ConfigError) as raised:
        Objective(loss="dpo", label_smoothing=0.1)  # type: ignore[arg-type]
    assert len(raised.value.problems) == 1


def test_judging_an_objective_loads_no_torch():
    code = (
        "import sys; from megatron_idpo.objective.settings import Objective; Objective();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
