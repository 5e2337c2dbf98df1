"""The configuration of one sDPO step, and problems between steps and other sections."""

from typing import Any

import pytest

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.export import ExportConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.sdpo_steps import step_config, step_name, step_problems

from . import helper

GOOD: dict[str, dict[str, Any]] = {
    "model": {"path": "some/model"},
    "data": {"train": ["a.jsonl", "b.jsonl"]},
    "optimizer": {"lr": 5e-4},
    "training": {"output": "runs/x"},
}


def complete(steps: tuple[dict[str, Any], ...], sections: dict[str, Any]) -> dict[str, Any]:
    """The sections with required fields and steps added."""
    sections["sdpo"] = {"steps": list(steps or ({}, {})), **sections.get("sdpo", {})}
    return {name: {**GOOD.get(name, {}), **sections.get(name, {})} for name in {*GOOD, *sections}}


def load(tmp_path, *steps: dict[str, Any], **sections: Any) -> RunConfig:
    return helper.load(tmp_path, required=REQUIRED, **complete(steps, sections))


def problems_of(tmp_path, *steps: dict[str, Any], **sections: Any) -> list[str]:
    return helper.problems_of(tmp_path, required=REQUIRED, **complete(steps, sections))


def changed(config: RunConfig, number: int) -> dict[str, Any]:
    """Values of a step's configuration that differ from the run's, by `section.field`."""
    before, after = config.model_dump(), step_config(config, number).model_dump()
    assert after["sdpo"] is None
    return {
        f"{section}.{name}": value
        for section in set(SECTIONS) - {"sdpo"}
        for name, value in (after[section] or {}).items()
        if value != before[section][name]
    }


def test_train_reads_the_section():
    assert "sdpo" in {*REQUIRED, *OPTIONAL}


def test_a_step_has_its_own_directory_and_seed(tmp_path):
    config = load(tmp_path, training={"seed": 5})
    assert changed(config, 1) == {"training.output": "runs/x/step-1", "training.export": False}
    assert changed(config, 2) == {
        "training.output": "runs/x/step-2",
        "training.export": False,
        "training.seed": 6,
    }
    assert step_name(12) == "step-12"


def test_a_tilde_is_expanded_before_the_step_is_appended(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    step = step_config(load(tmp_path, training={"output": "~/x"}, reference={"cache": "~/c"}), 1)
    assert step.training.output == f"{tmp_path}/x/step-1"
    assert step.reference.cache == f"{tmp_path}/c/step-1"


def test_fields_of_a_step_replace_those_of_the_run(tmp_path):
    own = {
        "lr": 1e-5,
        "warmup_steps": 3,
        "epochs": 2,
        "max_steps": 7,
        "beta": 0.2,
        "layers": [1, 2],
        "intermediate_weight": 0.3,
        "export": True,
    }
    config = load(tmp_path, {}, own, training={"export": False})
    assert changed(config, 1) == {"training.output": "runs/x/step-1"}
    assert changed(config, 2) == {
        "optimizer.lr": 1e-5,
        "optimizer.warmup_steps": 3,
        "training.epochs": 2,
        "training.max_steps": 7,
        "objective.beta": 0.2,
        "objective.layers": (1, 2),
        "objective.intermediate_weight": 0.3,
        "training.export": True,
        "training.output": "runs/x/step-2",
        "training.seed": 1,
    }


def test_export_settings_apply_to_the_result_and_to_exported_steps(tmp_path):
    export = {"dtype": "fp32", "license": "mit", "push_to_hub": "me/x", "private": False}
    config = load(tmp_path, {}, {"export": True}, export=export)
    assert step_config(config, 1).export == ExportConfig()
    assert step_config(config, 2).export == ExportConfig(dtype="fp32", license="mit")


def test_export_settings_without_an_exported_result(tmp_path):
    sections = {"training": {"export": False}, "export": {"dtype": "fp32"}}
    (problem,) = problems_of(tmp_path, **sections)
    assert "export (" in problem and "has no effect: training.export is false" in problem
    load(tmp_path, {}, {"export": True}, **sections)
    sections["export"]["push_to_hub"] = "me/x"
    (problem,) = problems_of(tmp_path, {}, {"export": True}, **sections)
    assert "export.push_to_hub" in problem and "models of single steps are not uploaded" in problem


def test_step_config_does_not_change_the_run(tmp_path):
    config = load(tmp_path, {"lr": 1e-5}, lora={"adapter": "some/adapter"})
    before = config.dump()
    step_config(config, 1)
    assert config.dump() == before


def test_a_layout_is_replaced_as_a_whole(tmp_path):
    layout = {"tensor": 2, "sequence_parallel": True}
    config = load(tmp_path, {}, {"layout": {"pipeline": 2}}, layout=layout)
    assert step_config(config, 1).layout == Layout(**layout)
    assert step_config(config, 2).layout == Layout(pipeline=2)


def test_the_adapter_is_the_first_steps_alone(tmp_path):
    config = load(tmp_path, lora={"adapter": "some/adapter", "rank": 4, "targets": ["q_proj"]})
    first, second = step_config(config, 1).lora, step_config(config, 2).lora
    assert first == config.lora
    assert second is not None and second.adapter is None
    assert (second.rank, second.targets) == (4, ("q_proj",))
    assert step_config(load(tmp_path), 2).lora is None


def test_each_step_has_its_own_cache(tmp_path):
    config = load(tmp_path, reference={"cache": "some/cache"})
    assert step_config(config, 2).reference.cache == "some/cache/step-2"
    assert step_config(load(tmp_path), 2).reference.cache is None


def test_a_step_always_resumes(tmp_path):
    config = load(tmp_path, checkpoint={"resume": "never", "every_steps": 7})
    step = step_config(config, 1).checkpoint
    assert (step.resume, step.every_steps) == ("auto", 7)


def test_a_plain_dpo_step_ignores_layer_fields(tmp_path):
    objective = {
        "layers": [1, 2],
        "intermediate_weight": 0.4,
        "layer_weights": [1.0, 2.0],
        "reference_layer": "final",
        "norm": "none",
        "beta": 0.3,
    }
    config = load(tmp_path, {"layers": []}, {"layers": [2, 3]}, objective=objective)
    plain, other = step_config(config, 1).objective, step_config(config, 2).objective
    assert plain.model_dump(exclude_defaults=True) == {"beta": 0.3}
    assert other == config.objective.model_copy(update={"layers": (2, 3)})
    assert step_config(load(tmp_path, objective=objective), 1).objective == config.objective
    weightless = load(tmp_path, {"layers": [], "intermediate_weight": 0.0}, objective=objective)
    assert step_config(weightless, 1).objective.intermediate_weight == 0.0


@pytest.mark.parametrize("steps", [0, 5])
def test_warmup_steps_of_a_step_replace_a_warmup_fraction(tmp_path, steps):
    config = load(tmp_path, {"warmup_steps": steps}, {}, optimizer={"warmup_fraction": 0.1})
    own, other = (step_config(config, number).optimizer for number in (1, 2))
    assert (own.warmup_steps, own.warmup_fraction) == (steps, None)
    assert (other.warmup_steps, other.warmup_fraction) == (0, 0.1)


def test_a_dump_is_loaded_as_the_same_configuration(tmp_path):
    steps = [
        {"fraction": 1 / 3, "lr": 1e-7, "layers": {"every": 4}, "layout": {"tensor": 2}},
        {"fraction": 2 / 3, "layers": [0.5, 2], "export": True},
    ]
    for config in (
        load(tmp_path, *steps, sdpo={"order": "random", "only": 2, "target": "first"}),
        load(tmp_path, {"sources": [2]}, {"sources": [1], "layers": []}),
        load(tmp_path),
    ):
        (tmp_path / "dumped.yaml").write_text(config.dump())
        again = load_config(tmp_path / "dumped.yaml", required=REQUIRED, optional=OPTIONAL)
        assert again == config and again.sdpo == config.sdpo
        for number in (1, 2):
            assert step_config(again, number) == step_config(config, number)


def test_a_step_config_is_a_valid_run_config(tmp_path):
    step = step_config(load(tmp_path, {"lr": 1e-5}, {"layout": {"tensor": 2}}), 2)
    (tmp_path / "step.yaml").write_text(step.dump())
    assert load_config(tmp_path / "step.yaml", required=REQUIRED, optional=OPTIONAL) == step
    assert list(step_problems(step)) == []


HARD = {"order": "easy_to_hard"}

# Steps, sections, and parts of their one problem.
INVALID: list[tuple[list[dict[str, Any]], dict[str, Any], tuple[str, ...]]] = [
    (
        [],
        {"reference": {"source": "none"}},
        (
            "reference.source",
            "is none, but the reference of every sDPO step",
            "use cache",
            "leave the section sdpo out",
        ),
    ),
    (
        [],
        {"reference": {"source": "adapter_off"}, "lora": {}, "sdpo": {"target": "first"}},
        ("reference.source", "adapter_off", "sdpo.target = first", "use cache"),
    ),
    (
        [],
        {"reference": {"source": "adapter_off"}, "lora": {}, "sdpo": {"adapters": "carry"}},
        ("reference.source", "adapter_off", "sdpo.adapters = carry", "use cache"),
    ),
    (
        [],
        {"sdpo": {"adapters": "carry"}},
        ("sdpo.adapters", "is carry", "no adapters", "leave it out, or add the section lora"),
    ),
    (
        [{}, {}, {}],
        {"sdpo": HARD},
        ("sdpo.steps", "are 3", "one of the 2 sources", "as many steps as sources", "by to pair"),
    ),
    (
        [{"sources": [1, 2]}, {"sources": [3]}],
        {},
        ("sdpo.steps.1.sources", "names source 3, but data.train has 2", "from 1 to 2"),
    ),
    (
        [{"sources": [2]}, {"sources": [2]}],
        {},
        ("sdpo.steps", "leave source 1 of data.train out", "name it in a step, or remove it"),
    ),
    (
        [{}, {"intermediate_weight": 0.3}],
        {},
        ("sdpo.steps.1.intermediate_weight", "no intermediate layers", "objective.layers"),
    ),
    (
        [{"layers": [], "intermediate_weight": 0.3}],
        {"objective": {"layers": [1]}},
        ("sdpo.steps.0.intermediate_weight", "no effect", "no intermediate layers"),
    ),
    (
        [{}, {"lr": 1e-6}],
        {"optimizer": {"min_lr": 1e-5}},
        ("sdpo.steps.1", "min_lr is 1e-05, above lr 1e-06", "lower it"),
    ),
    (
        [{}, {"layout": {"tensor": 8, "sequence_parallel": True}}],
        {"data": {"row_tokens": 1028, "trim_tokens": 0}},
        ("sdpo.steps.1", "data.row_tokens is 1028", "layout.tensor = 8", "use 1032"),
    ),
    (
        [],
        {"reference": {"source": "adapter_off"}},
        ("reference.source", "there are no adapters", "add the section lora"),
    ),
    (
        [],
        {"training": {"eval_every_steps": 5}},
        ("training.eval_every_steps", "no held-out pairs", "data.eval"),
    ),
]


@pytest.mark.parametrize(("steps", "sections", "words"), INVALID)
def test_a_problem_has_location_value_and_remedy(tmp_path, steps, sections, words):
    (message,) = problems_of(tmp_path, *steps, **sections)
    assert all(word in message for word in words), message
    location, line = message.split(": ", 1)[0].split(" (")
    assert location == words[0] and line.startswith("run.yaml:")


def test_every_invalid_step_is_reported(tmp_path):
    wrong = {"intermediate_weight": 0.3}
    problems = problems_of(tmp_path, wrong, {}, wrong)
    assert [problem.split(" (")[0] for problem in problems] == [
        f"sdpo.steps.{index}.intermediate_weight" for index in (0, 2)
    ]


def test_valid_combinations(tmp_path):
    load(tmp_path, lora={}, reference={"source": "adapter_off"})
    load(tmp_path, lora={}, sdpo={"adapters": "carry", "target": "first"})
    load(tmp_path, reference={"source": "offloaded"})
    load(tmp_path, sdpo=HARD)
    load(tmp_path, {}, {}, {}, sdpo={**HARD, "by": "pair"})
    load(tmp_path, {"sources": [2]}, {"sources": [1, 2]})


def test_steps_without_training_are_not_checked(tmp_path):
    sections = {"reference": {"source": "none"}, "sdpo": {"steps": [{}]}}
    assert helper.load(tmp_path, **sections).has("sdpo")
    config = helper.load(tmp_path, **GOOD, sdpo={"steps": [{}]})
    assert list(step_problems(config)) == []
