"""Checks of a configuration against the model, and against the checkpoint to resume from."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.run_pairs import row_settings
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.testing import tiny_hf_config
from megatron_idpo.train import setup
from megatron_idpo.train.setup import (
    _check_one_row,
    _check_same_pairs,
    _training_differences,
    check_against_model,
)

from .tiny_run import LORA, Files, write_config

LLAMA = Architecture.from_hf(tiny_hf_config("llama"))


@pytest.fixture
def config(tmp_path):
    """Builds a configuration with changed sections."""

    def make(**sections: Any) -> RunConfig:
        file = write_config(Files(tmp_path), tmp_path / "run", **sections)
        return load_config(file, required=REQUIRED, optional=OPTIONAL)

    return make


def locations(config: RunConfig, world_size: int = 1) -> list[str]:
    """Locations of the problems."""
    with pytest.raises(ConfigError) as raised:
        check_against_model(config, LLAMA, world_size)
    return [problem.location for problem in raised.value.problems]


def test_valid_configurations_pass(config):
    check_against_model(config(), LLAMA, 1)
    check_against_model(config(layout={"tensor": 2, "pipeline": 2}), LLAMA, 8)
    check_against_model(config(objective={"layers": "all"}), LLAMA, 1)


def test_sequences_that_the_rotary_embedding_does_not_allow_are_refused_at_the_start(config):
    limited = replace(LLAMA, longest_sequence=12)
    check_against_model(config(data={"max_length": 12}), limited, 1)
    for data in ({"max_length": 13}, {"max_length": None}):
        with pytest.raises(ConfigError, match="set data\\.max_length to at most 12"):
            check_against_model(config(data=data), limited, 1)


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
def test_problem_is_located(config, sections, location):
    reported = locations(config(**sections), world_size=3 if "layout" in sections else 1)
    assert any(each.startswith(location) for each in reported), reported


def test_missing_logger_package_is_reported(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert locations(config(logging={"wandb": {"project": "p"}})) == ["logging.wandb"]


def test_all_problems_are_reported_at_once(config):
    reported = locations(config(model={"dtype": "fp16"}, objective={"layers": [9]}))
    assert set(reported) == {"model.dtype", "objective.layers"}


@pytest.mark.parametrize(
    ("sections", "processes", "remedy"),
    [
        (
            {"data": {"row_tokens": 90, "max_length": 80}},
            1,
            r"of data\.row_tokens = 90; set data\.row_tokens to 102,",
        ),
        ({}, 2, "must be in one row; use a layout without data parallelism"),
        ({"layout": {"pipeline": 2, "virtual_pipeline": 2}}, 2, "and interleaving"),
    ],
)
def test_sorted_losses_need_each_batch_in_one_row(config, sections, processes, remedy):
    run = config(objective={"loss": ["sigmoid", "aot"]}, **sections)
    # 2 pairs are in a batch; the longest two need 51 positions each.
    run = run.model_copy(
        update={"training": run.training.model_copy(update={"global_batch_pairs": 2})}
    )
    pairs = SimpleNamespace(lengths_P3=np.array([[17, 17, 17], [1, 2, 1], [17, 17, 17]]))
    with pytest.raises(ConfigError, match=f"is sigmoid and aot, which compares all.*{remedy}"):
        _check_one_row(pairs, row_settings(run, processes), run)
    _check_one_row(pairs, row_settings(config(objective={"loss": "aot"}), 1), run)


# ---- resuming -----------------------------------------------------------------------------------


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
def test_settings_that_may_change(config, changes):
    assert (
        _training_differences(saved(config(lora=LORA)), config(lora=LORA, **changes), "here") == []
    )


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({}, {"objective": {"beta": 0.5}}, "objective.beta was 0.3, is now 0.5"),
        ({}, {"objective": {"layers": [1]}}, "objective.layers was [1, 3], is now [1]"),
        ({}, {"objective": {"norm": "none"}}, "objective.norm was final, is now none"),
        ({"lora": LORA}, {"lora": {**LORA, "rank": 8}}, "lora.rank was 4, is now 8"),
        ({"lora": LORA}, {"lora": {**LORA, "dropout": 0.1}}, "lora.dropout was 0.0, is now 0.1"),
        ({"lora": LORA}, {}, "lora.rank was 4, is now not set"),
        ({}, {"lora": LORA}, "lora.rank was not set, is now 4"),
    ],
)
def test_changed_objective_or_adapter_is_reported(config, before, now, reason):
    reference = {"reference": {"source": "none"}}
    problems = _training_differences(
        saved(config(**before, **reference)), config(**now, **reference), "step-3"
    )
    assert any(problem.message == reason for problem in problems), problems
    assert all(problem.location == "step-3" and problem.remedy for problem in problems)


def test_reference_cannot_be_added_or_dropped(config):
    before, now = config(), config(reference={"source": "none"})
    for first, second in ((before, now), (now, before)):
        (problem,) = _training_differences(saved(first), second, "step-3")
        assert "reference.source" in problem.message
    adapter_off = config(reference={"source": "adapter_off"}, lora=LORA)
    resident = config(reference={"source": "resident"}, lora=LORA)
    assert _training_differences(saved(adapter_off), resident, "step-3") == []


@pytest.mark.parametrize(
    ("other", "location"),
    [(["a", "b"], None), (["x", "b"], "data.train"), (["a", "x"], "data.eval"), (["a", None], "")],
)
def test_ranks_that_read_other_pairs_raise(monkeypatch, other, location):
    pairs: Any = SimpleNamespace(
        train=SimpleNamespace(fingerprint="a"), eval=SimpleNamespace(fingerprint="b")
    )
    monkeypatch.setattr(setup, "all_gather_objects", lambda own: [own, own, other])
    if location is None:
        _check_same_pairs(pairs)
        return
    with pytest.raises(DataError, match=f"{location}.*other pairs on rank 2 than on rank 0"):
        _check_same_pairs(pairs)
