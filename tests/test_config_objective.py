"""What is learnt, and what of it the sections refuse: each with place, value and remedy."""

from dataclasses import asdict
from typing import Any

import pytest
import yaml

from megatron_idpo.config.objective import ObjectiveConfig
from megatron_idpo.config.run_config import RunConfig, load_config
from megatron_idpo.errors import ConfigError
from megatron_idpo.objective.settings import Objective

SECTIONS = ("objective", "lora", "reference")


def load(tmp_path, **sections: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return load_config(path, optional=SECTIONS)


def refused(tmp_path, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, **sections)
    return [str(problem) for problem in raised.value.problems]


def test_nothing_written_is_plain_dpo_with_all_weights(tmp_path):
    config = load(tmp_path)
    assert config.objective.layers == () and config.lora is None
    assert config.objective.objective() == Objective()
    assert not config.has("lora") and config.has("objective")


def test_an_objective_is_the_plugins(tmp_path):
    written = {
        "loss": "robust",
        "beta": 0.2,
        "label_smoothing": 0.1,
        "nll_weight": 0.5,
        "intermediate_weight": 0.3,
        "layer_weights": [1.0, 2.0],
        "reference_layer": "final",
    }
    config = load(tmp_path, objective={**written, "layers": [1, 2]})
    objective = config.objective.objective()
    assert asdict(objective) == {**written, "layer_weights": (1.0, 2.0)}
    assert set(ObjectiveConfig.model_fields) - set(asdict(objective)) == {"layers", "norm"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([22], (22,)),
        ([0.69, 3], (0.69, 3)),
        ([], ()),
        ("all", "all"),
        ({"every": 4}, {"every": 4}),
    ],
)
def test_layers_as_they_may_be_written(tmp_path, written, read):
    fields = {} if written != [] else {"intermediate_weight": 0.0}
    assert load(tmp_path, objective={"layers": written, **fields}).objective.layers == read


@pytest.mark.parametrize(
    "written",
    ["22", "every", 22, [True], ["1"], {"every": True}, {"each": 4}, {"every": 4, "a": 1}],
)
def test_layers_as_they_may_not_be_written(tmp_path, written):
    (message,) = refused(tmp_path, objective={"layers": written})
    assert message.startswith("objective.layers (run.yaml:") and f"is {written!r}" in message
    assert "give a list of layer numbers or depth fractions, {every: n}" in message


# A section's fields, and what its one problem says.
MISTAKES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("objective", {"loss": "dpo"}, ("objective.loss", "'dpo'", "`ipo`")),
    ("objective", {"beta": 0.0}, ("objective.beta", "is 0.0", "greater than 0")),
    ("objective", {"label_smoothing": 0.5}, ("objective.label_smoothing", "0.5", "[0, 0.5)")),
    (
        "objective",
        {"loss": "ipo", "label_smoothing": 0.1},
        ("objective.label_smoothing", "no meaning for the loss ipo", "set it to 0"),
    ),
    (
        "objective",
        {"layers": [1], "intermediate_weight": 1.1},
        ("objective.intermediate_weight", "1.1"),
    ),
    (
        "objective",
        {"intermediate_weight": 0.2},
        ("objective.intermediate_weight", "not be read", "no intermediate", "objective.layers"),
    ),
    (
        "objective",
        {"layer_weights": [1.0]},
        ("objective.layer_weights", "not be read", "objective.layers"),
    ),
    (
        "objective",
        {"reference_layer": "final"},
        ("objective.reference_layer", "not be read", "objective.layers"),
    ),
    ("objective", {"norm": "none"}, ("objective.norm", "not be read", "objective.layers")),
    (
        "objective",
        {"layers": [1], "layer_weights": [0.0]},
        ("objective.layer_weights.0", "is 0.0", "greater than 0"),
    ),
    ("lora", {"dropout": 1.0}, ("lora.dropout", "is 1.0", "below 1")),
    ("lora", {"dropout": -0.1}, ("lora.dropout", "is -0.1")),
    ("lora", {"targets": []}, ("lora.targets", "names no projection", "leave the section out")),
    ("lora", {"targets": ["q_prj"]}, ("lora.targets", "'q_prj'", "all-linear", "q_proj")),
    ("lora", {"targets": "q_proj"}, ("lora.targets", "'q_proj'", "all-linear", "list")),
    ("lora", {"targets": 3}, ("lora.targets", "is 3", "all-linear", "list")),
    (
        "lora",
        {"targets": ["q_proj", "q_proj"]},
        ("lora.targets", "names q_proj twice", "once"),
    ),
    ("lora", {"rank": 0}, ("lora.rank", "is 0", "greater than 0")),
    ("lora", {"r": 8}, ("lora.r", "unknown field", "rank")),
    ("reference", {"source": "live"}, ("reference.source", "'live'")),
    (
        "reference",
        {"source": "adapter_off"},
        ("reference.source", "adapter_off", "no adapters", "section lora"),
    ),
]


@pytest.mark.parametrize(("section", "fields", "words"), MISTAKES)
def test_one_mistake_is_one_problem_with_place_and_remedy(tmp_path, section, fields, words):
    (message,) = refused(tmp_path, **{section: fields})
    assert all(word in message for word in words), message


def test_the_weight_zero_is_no_mistake_without_layers(tmp_path):
    assert load(tmp_path, objective={"intermediate_weight": 0.0}).objective.layers == ()
    assert load(tmp_path, objective={"intermediate_weight": 0.1}).objective.layers == ()


def test_adapters_off_needs_adapters_only(tmp_path):
    config = load(tmp_path, reference={"source": "adapter_off"}, lora={"rank": 8})
    assert config.reference.source == "adapter_off"
    assert config.lora is not None and config.lora.targets == "all-linear"
    config = load(tmp_path, lora={"targets": ["q_proj", "v_proj"]})
    assert config.lora is not None and config.lora.targets == ("q_proj", "v_proj")
