"""The section `sdpo`: forms and problems."""

from typing import Any

import pytest

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.sdpo import SdpoConfig, SdpoStepConfig

from .helper import load, problems_of


def section(tmp_path, *overrides: str, **fields: Any) -> SdpoConfig:
    sdpo = load(tmp_path, overrides, sdpo=fields).sdpo
    assert sdpo is not None
    return sdpo


def test_defaults(tmp_path):
    sdpo = section(tmp_path, steps=[{}, {}])
    assert sdpo.steps == (SdpoStepConfig(), SdpoStepConfig())
    assert (sdpo.order, sdpo.by, sdpo.measure) == ("given", "source", "accuracy")
    assert (sdpo.target, sdpo.adapters, sdpo.only) == ("previous", "merge", None)
    assert sdpo.keep_snapshots == "all" and not sdpo.keep_checkpoints
    assert not sdpo.length_normalised and not sdpo.steps[0].export
    fields = set(SdpoStepConfig.model_fields) - {"export"}
    assert all(getattr(sdpo.steps[0], name) is None for name in fields)


def test_the_section_is_optional(tmp_path):
    config = load(tmp_path)
    assert config.sdpo is None and not config.has("sdpo")
    assert load(tmp_path, ["sdpo=null"], sdpo={"steps": [{}]}).sdpo is None


def test_a_step_with_every_field(tmp_path):
    written = {
        "fraction": 1,
        "lr": 1e-5,
        "warmup_steps": 0,
        "epochs": 2,
        "max_steps": 7,
        "beta": 0.2,
        "layers": {"every": 4},
        "intermediate_weight": 0.3,
        "layout": {"tensor": 2},
        "export": True,
    }
    (step,) = section(tmp_path, steps=[written]).steps
    assert {name: getattr(step, name) for name in written} == {
        **written,
        "layout": Layout(tensor=2),
    }
    assert section(tmp_path, steps=[{"sources": [2, 1]}]).steps[0].sources == (2, 1)
    assert section(tmp_path, steps=[{"layers": []}]).steps[0].layers == ()


def test_overrides(tmp_path):
    sdpo = section(tmp_path, "sdpo.only=2", "sdpo.target=first", steps=[{}, {}])
    assert (sdpo.only, sdpo.target) == (2, "first")


def test_rounded_thirds_sum_to_one(tmp_path):
    assert len(section(tmp_path, steps=[{"fraction": 0.3333333}] * 3).steps) == 3


@pytest.mark.parametrize(
    ("fields", "names_sources", "takes_whole_sources"),
    [
        ({}, False, False),
        ({"order": "random"}, False, False),
        ({"order": "easy_to_hard"}, False, True),
        ({"order": "easy_to_hard", "by": "pair"}, False, False),
        ({"steps": [{"sources": [1]}]}, True, False),
    ],
)
def test_how_pairs_are_split(tmp_path, fields, names_sources, takes_whole_sources):
    sdpo = section(tmp_path, **{"steps": [{}], **fields})
    assert sdpo.names_sources is names_sources
    assert sdpo.takes_whole_sources is takes_whole_sources


def steps(*written: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"steps": list(written), **fields}


# Fields, and parts of their one problem.
INVALID: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"order": "random"}, ("sdpo.steps", "is missing", "Every step in order")),
    (steps(), ("sdpo.steps", "is []", "at least one")),
    (steps({}, only=0), ("sdpo.only", "is 0", "greater than 0")),
    (steps({}, {}, only=3), ("sdpo.only", "is 3", "there are 2 steps", "from 1 to 2")),
    (
        steps({"sources": [1]}, {}),
        ("sdpo.steps.1", "sets no sources, but other steps do", "in all or none"),
    ),
    (
        steps({}, {"fraction": 1.0}),
        ("sdpo.steps.0", "sets no fraction, but other steps do", "in all or none"),
    ),
    (
        steps({"sources": [1]}, order="random"),
        ("sdpo.steps.0.sources", "order is random", "leave them out, or set order to given"),
    ),
    (
        steps({"sources": [1]}, order="easy_to_hard"),
        ("sdpo.steps.0.sources", "order is easy_to_hard", "set order to given"),
    ),
    (steps({"sources": [1]}, {"sources": []}), ("sdpo.steps.1.sources", "is []", "at least one")),
    (
        steps({"sources": [1], "fraction": 1.0}),
        ("sdpo.steps.0.fraction", "no effect", "steps name their sources", "keep one"),
    ),
    (
        steps({"fraction": 1.0}, order="easy_to_hard"),
        ("sdpo.steps.0.fraction", "no effect", "a whole source", "set by to pair"),
    ),
    (
        steps({"fraction": 0.5}, {"fraction": 0.4}),
        ("sdpo.steps", "sum to 0.9", "make them sum to 1"),
    ),
    (
        steps({"fraction": 0.50001}, {"fraction": 0.5}),
        ("sdpo.steps", "sum to 1.00001", "make them sum to 1"),
    ),
    (steps({}, by="pair"), ("sdpo.by", "no effect", "order is given", "easy_to_hard")),
    (
        steps({}, measure="margin", order="random"),
        ("sdpo.measure", "no effect", "order is random", "easy_to_hard"),
    ),
    (
        steps({}, length_normalised=True),
        ("sdpo.length_normalised", "no effect", "order is given", "easy_to_hard"),
    ),
    (steps({}, order="easy_to_hrad"), ("sdpo.order", "'easy_to_hrad'", "`easy_to_hard`")),
    (steps({}, by="row"), ("sdpo.by", "'row'", "source, pair")),
    (steps({}, measure="loss"), ("sdpo.measure", "'loss'", "accuracy, margin")),
    (steps({}, target="frist"), ("sdpo.target", "'frist'", "`first`")),
    (steps({}, adapters="keep"), ("sdpo.adapters", "'keep'", "merge, carry")),
    (steps({}, keep_snapshots="none"), ("sdpo.keep_snapshots", "'none'", "all, last")),
    (steps({}, keep_checkpoints="yes"), ("sdpo.keep_checkpoints", "'yes'", "boolean")),
    (steps({}, orders="given"), ("sdpo.orders", "unknown field", "`order`")),
    (steps({"sources": [0]}), ("sdpo.steps.0.sources.0", "is 0", "greater than 0")),
    (steps({"sources": 1}), ("sdpo.steps.0.sources", "is 1", "list")),
    (steps({"fraction": 0.0}), ("sdpo.steps.0.fraction", "is 0.0", "greater than 0")),
    (steps({}, {"lr": "fast"}), ("sdpo.steps.1.lr", "'fast'", "number")),
    (steps({"lr": 0.0}), ("sdpo.steps.0.lr", "is 0.0", "greater than 0")),
    (steps({"warmup_steps": -1}), ("sdpo.steps.0.warmup_steps", "is -1")),
    (steps({"epochs": 0}), ("sdpo.steps.0.epochs", "is 0", "greater than 0")),
    (steps({"max_steps": 0}), ("sdpo.steps.0.max_steps", "is 0", "greater than 0")),
    (steps({"beta": 0.0}), ("sdpo.steps.0.beta", "is 0.0", "greater than 0")),
    (
        steps({"layers": "every"}),
        ("sdpo.steps.0.layers", "'every'", "depth fractions", "{every: n}"),
    ),
    (
        steps({"intermediate_weight": 1.5}),
        ("sdpo.steps.0.intermediate_weight", "is 1.5", "less than or equal to 1"),
    ),
    (steps({"layout": {"tensors": 2}}), ("sdpo.steps.0.layout.tensors", "`tensor`")),
    (
        steps({"layout": {"sequence_parallel": True}}),
        ("sdpo.steps.0.layout.sequence_parallel", "tensor"),
    ),
    (steps({"learning_rate": 1.0}), ("sdpo.steps.0.learning_rate", "unknown field")),
    (steps({"exports": True}), ("sdpo.steps.0.exports", "unknown field", "`export`")),
    (steps({"seed": 1}), ("sdpo.steps.0.seed", "unknown field", "`data.seed`")),
]


@pytest.mark.parametrize(("fields", "words"), INVALID)
def test_a_problem_has_location_value_and_remedy(tmp_path, fields, words):
    (message,) = problems_of(tmp_path, sdpo=fields)
    assert all(word in message for word in words), message
    location, line = message.split(": ", 1)[0].split(" (")
    assert location == words[0] and line.startswith("run.yaml:")


def test_all_problems_are_reported_together(tmp_path):
    problems = problems_of(tmp_path, sdpo=steps({"fraction": 0.5}, {}, only=3, by="pair"))
    assert [problem.split(" (")[0] for problem in problems] == [
        "sdpo.only",
        "sdpo.steps.1",
        "sdpo.steps",
        "sdpo.by",
    ]
