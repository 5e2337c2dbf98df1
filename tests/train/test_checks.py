"""A configuration against the model and against the run before: every mistake, at once."""

from typing import Any

import pytest

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.run_config import RunConfig, load_config
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.testing import tiny_hf_config
from megatron_idpo.train.checks import check_against_model, check_same_training

from .tiny_run import LORA, Files, write_config

LLAMA = Architecture.from_hf(tiny_hf_config("llama"))


@pytest.fixture
def config(tmp_path):
    """A configuration with changed sections."""

    def make(**sections: Any) -> RunConfig:
        file = write_config(Files(tmp_path), tmp_path / "run", **sections)
        return load_config(file, required=REQUIRED, optional=OPTIONAL)

    return make


def locations(config: RunConfig, world_size: int = 1) -> list[str]:
    """What is found wrong, by place."""
    with pytest.raises(ConfigError) as raised:
        check_against_model(config, LLAMA, world_size)
    return [problem.location for problem in raised.value.problems]


def test_nothing_is_wrong(config):
    check_against_model(config(), LLAMA, 1)
    check_against_model(config(layout={"tensor": 2, "pipeline": 2}), LLAMA, 8)
    check_against_model(config(objective={"layers": "all"}), LLAMA, 1)


@pytest.mark.parametrize(
    ("sections", "location"),
    [
        ({"objective": {"layers": [4]}}, "objective.layers"),
        ({"objective": {"layers": [0]}}, "objective.layers"),
        ({"objective": {"layer_weights": [1.0, 1.0, 1.0]}}, "objective.layer_weights"),
        ({"layout": {"pipeline": 3}}, "layout.pipeline"),
        ({"model": {"dtype": "fp16"}}, "model.dtype"),
    ],
)
def test_what_this_model_cannot_do(config, sections, location):
    found = locations(config(**sections), world_size=3 if "layout" in sections else 1)
    assert any(one.startswith(location) for one in found), found


def test_a_logger_that_is_not_installed(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert locations(config(logging={"wandb": {"project": "p"}})) == ["logging.wandb"]


def test_all_mistakes_together(config):
    found = locations(config(model={"dtype": "fp16"}, objective={"layers": [9]}), world_size=1)
    assert set(found) == {"model.dtype", "objective.layers"}


# ---- the run before -----------------------------------------------------------------------------


def saved(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"lr": 1.0}},
        {"training": {"epochs": 9, "output": "elsewhere"}},
        {"layout": {"tensor": 2}},
        {"checkpoint": {"every_steps": 7}},
        {"logging": {"every_steps": 7}},
        {"data": {"row_tokens": 4096}},
    ],
)
def test_what_may_change(config, changes):
    assert check_same_training(saved(config(lora=LORA)), config(lora=LORA, **changes), "here") == []


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({}, {"objective": {"beta": 0.5}}, "objective.beta = 0.3, not 0.5"),
        ({}, {"objective": {"layers": [1]}}, "objective.layers = [1, 3], not [1]"),
        ({}, {"objective": {"norm": "none"}}, "objective.norm = final, not none"),
        ({"lora": LORA}, {"lora": {**LORA, "rank": 8}}, "lora.rank = 4, not 8"),
        ({"lora": LORA}, {"lora": {**LORA, "dropout": 0.1}}, "lora.dropout = 0.0, not 0.1"),
        ({"lora": LORA}, {}, "lora.rank = 4, not None"),
        ({}, {"lora": LORA}, "lora.rank = None, not 4"),
    ],
)
def test_what_is_learnt_may_not(config, before, now, reason):
    reference = {"reference": {"source": "none"}}
    problems = check_same_training(
        saved(config(**before, **reference)), config(**now, **reference), "step-3"
    )
    assert any(problem.message == f"was written with {reason}" for problem in problems), problems
    assert all(problem.location == "step-3" and problem.remedy for problem in problems)


def test_whether_there_is_a_reference_may_not_change_either(config):
    before, now = config(), config(reference={"source": "none"})
    for first, second in ((before, now), (now, before)):
        (problem,) = check_same_training(saved(first), second, "step-3")
        assert "reference.source" in problem.message
    other_way = config(reference={"source": "adapter_off"}, lora=LORA)
    resident = config(reference={"source": "resident"}, lora=LORA)
    assert check_same_training(saved(other_way), resident, "step-3") == []
