"""The sections `objective` and `reference`."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.config.objective import LOSSES, Objective, ObjectiveConfig
from megatron_idpo.errors import ConfigError

from .helper import load, problems_of


def test_the_default_is_plain_dpo_of_all_weights(tmp_path):
    config = load(tmp_path)
    assert config.objective.layers == () and config.lora is None
    assert config.objective == ObjectiveConfig()
    assert not config.has("lora") and config.has("objective")


def test_the_section_is_an_objective_with_more_fields():
    assert set(ObjectiveConfig.model_fields) - set(Objective.model_fields) == {
        "layers",
        "norm",
        "router_aux_loss",
    }
    section = ObjectiveConfig(layers=(1, 2), layer_weights=(1.0, 3.0), intermediate_weight=0.4)
    assert isinstance(section, Objective)
    assert section.layer_scales(2) == (0.6, pytest.approx((0.1, 0.3)))


@pytest.mark.parametrize(
    ("written", "read"),
    [([22], (22,)), ([0.69, 3], (0.69, 3)), ([], ()), ("all", "all"), ({"every": 4}, {"every": 4})],
)
def test_forms_of_layers(tmp_path, written, read):
    fields = {} if written != [] else {"intermediate_weight": 0.0}
    assert load(tmp_path, objective={"layers": written, **fields}).objective.layers == read


@pytest.mark.parametrize(
    "written",
    ["22", "every", 22, [True], ["1"], {"every": True}, {"each": 4}, {"every": 4, "a": 1}],
)
def test_invalid_layers_are_reported(tmp_path, written):
    (message,) = problems_of(tmp_path, objective={"layers": written})
    assert message.startswith("objective.layers (run.yaml:") and f"is {written!r}" in message
    assert "give a list of layer numbers or depth fractions, {every: n}" in message


# Section, fields, and parts of the one problem.
INVALID: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("objective", {"loss": "dpo"}, ("objective.loss", "'dpo'", "use sigmoid")),
    ("objective", {"beta": 0.0}, ("objective.beta", "is 0.0", "greater than 0")),
    ("objective", {"label_smoothing": 0.5}, ("objective.label_smoothing", "0.5", "less than 0.5")),
    (
        "objective",
        {"loss": "ipo", "label_smoothing": 0.1},
        ("objective.label_smoothing", "no effect: loss is ipo", "set loss to sigmoid or robust"),
    ),
    ("objective", {"loss": ["sigmoid", "dpo"]}, ("objective.loss", "use sigmoid, which is DPO")),
    ("objective", {"loss": []}, ("objective.loss", "the values are sigmoid, ")),
    ("objective", {"loss": ["ipo", "ipo"]}, ("objective.loss", "each loss once")),
    ("objective", {"loss_weights": [1.0, 2.0]}, ("objective.loss_weights", "2 weights for 1 los")),
    ("objective", {"loss": "exo_pair"}, ("objective.label_smoothing", "is 0", "set it to 0.001")),
    ("objective", {"discopop_tau": 0.1}, ("objective.discopop_tau", "no effect: loss is sigmoid")),
    ("objective", {"f_alpha": 0.2}, ("objective.f_alpha", "no effect: f_divergence is reverse")),
    (
        "objective",
        {"loss": ["sigmoid", "bco_pair"], "f_divergence": "forward_kl"},
        ("objective.f_divergence", "not defined for bco_pair", "cancels", "use reverse_kl"),
    ),
    ("objective", {"loss": "aot", "wpo": True}, ("objective.wpo", "values of different pairs")),
    ("objective", {"loss": "sft", "wpo": True}, ("objective.wpo", "over tokens", "nll_weight")),
    (
        "objective",
        {"layers": [1], "intermediate_weight": 1.1},
        ("objective.intermediate_weight", "1.1"),
    ),
    (
        "objective",
        {"intermediate_weight": 0.2},
        ("objective.intermediate_weight", "no effect", "no intermediate", "objective.layers"),
    ),
    (
        "objective",
        {"layer_weights": [1.0]},
        ("objective.layer_weights", "no effect", "layers is []", "set layers"),
    ),
    (
        "objective",
        {"reference_layer": "final"},
        ("objective.reference_layer", "no effect", "layers is []", "set layers"),
    ),
    ("objective", {"norm": "none"}, ("objective.norm", "no effect", "layers is []", "set layers")),
    (
        "objective",
        {"layers": [1], "layer_weights": [0.0]},
        ("objective.layer_weights.0", "is 0.0", "greater than 0"),
    ),
    ("lora", {"r": 8}, ("lora.r", "unknown field", "rank")),
    ("reference", {"source": "live"}, ("reference.source", "'live'")),
    (
        "reference",
        {"source": "adapter_off"},
        ("reference.source", "adapter_off", "no adapters", "section lora"),
    ),
]


@pytest.mark.parametrize(("section", "fields", "words"), INVALID)
def test_a_problem_has_location_value_and_remedy(tmp_path, section, fields, words):
    (message,) = problems_of(tmp_path, **{section: fields})
    assert all(word in message for word in words), message


def test_weight_zero_is_allowed_without_layers(tmp_path):
    assert load(tmp_path, objective={"intermediate_weight": 0.0}).objective.layers == ()
    assert load(tmp_path, objective={"intermediate_weight": 0.1}).objective.layers == ()


def test_adapter_off_needs_adapters(tmp_path):
    config = load(tmp_path, reference={"source": "adapter_off"}, lora={"rank": 8})
    assert config.reference.source == "adapter_off"
    assert config.lora is not None and config.lora.targets == "all-linear"


@given(st.floats(1e-30, 1), st.lists(st.floats(1e-3, 1e3), max_size=6), st.booleans())
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


def test_a_wrong_number_of_layer_weights_is_reported():
    for count in (0, 3):
        message = f"objective.layer_weights: 2 weights for {count} layers; give one weight"
        with pytest.raises(ConfigError, match=message):
            Objective(layer_weights=(1.0, 2.0)).layer_scales(count)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", "dpo", "is 'dpo'; use sigmoid, which is DPO"),
        ("beta", 0.0, "is 0.0; it should be greater than 0"),
        ("beta", math.nan, "is nan"),
        ("beta", math.inf, "is inf"),
        ("label_smoothing", 0.5, "is 0.5; it should be less than 0.5"),
        ("label_smoothing", -0.1, "is -0.1"),
        ("nll_weight", -1.0, "is -1.0; it should be greater than or equal to 0"),
        ("intermediate_weight", 1.1, "is 1.1; it should be less than or equal to 1"),
        ("intermediate_weight", math.nan, "is nan"),
        ("reference_layer", "last", "is 'last'; the values are same, final"),
    ],
)
def test_construction_with_an_invalid_field_raises(field, value, message):
    with pytest.raises(ConfigError) as error:
        Objective(**{field: value})
    assert str(error.value).startswith(f"objective.{field}: {message}")


def test_construction_reports_all_problems_together():
    with pytest.raises(ConfigError, match=r"^3 problems"):
        Objective(beta=-1.0, intermediate_weight=2.0, nll_weight=-1.0)


def test_limits_of_valid_values():
    Objective(label_smoothing=0.4999, intermediate_weight=0.0, nll_weight=0.0, beta=1e-9)
    Objective(intermediate_weight=1.0, layer_weights=(), loss="robust", label_smoothing=0.1)
    for loss in set(LOSSES) - {"exo_pair"}:
        assert Objective(loss=loss).losses == (loss,)


def test_a_list_of_losses_has_weights(tmp_path):
    mpo = load(tmp_path, objective={"loss": ["sigmoid", "sft"], "loss_weights": [0.8, 1]})
    assert mpo.objective.terms == (("sigmoid", 0.8), ("sft", 1.0))
    assert Objective(loss=("sigmoid", "sft")).terms == (("sigmoid", 1.0), ("sft", 1.0))
    assert mpo.objective.uses("aot", "sft") and not mpo.objective.uses("aot")
