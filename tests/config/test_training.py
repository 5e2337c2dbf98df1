"""The sections `optimizer`, `training`, `checkpoint` and `logging`, and problems between them."""

from typing import Any

import pytest

from megatron_idpo.cli.train import REQUIRED
from megatron_idpo.config.run_config import RunConfig

from . import helper

GOOD: dict[str, dict[str, Any]] = {
    "model": {"path": "some/model"},
    "data": {"train": "pairs.jsonl"},
    "optimizer": {"lr": 5e-4},
    "training": {"output": "runs/x"},
}


def complete(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections with the required fields added."""
    return {name: {**GOOD.get(name, {}), **sections.get(name, {})} for name in {*GOOD, *sections}}


def load(tmp_path, **sections: Any) -> RunConfig:
    return helper.load(tmp_path, required=REQUIRED, **complete(sections))


def problems_of(tmp_path, **sections: Any) -> list[str]:
    return helper.problems_of(tmp_path, required=REQUIRED, **complete(sections))


def test_defaults(tmp_path):
    config = load(tmp_path)
    optimizer, checkpoint = config.optimizer, config.checkpoint
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.clip_grad) == ("cosine", 0, 1.0)
    assert (config.training.global_batch_pairs, config.training.epochs) == (32, 1)
    assert (checkpoint.every_steps, checkpoint.keep_last, checkpoint.keep_best) == (100, 2, 0)
    assert checkpoint.resume == "auto" and config.training.start_check and config.training.export
    assert config.logging.every_steps == 10 and config.logging.wandb is None


@pytest.mark.parametrize("section", REQUIRED)
def test_a_missing_section_is_reported(tmp_path, section):
    present = {name: GOOD[name] for name in GOOD if name != section}
    (problem,) = helper.problems_of(tmp_path, required=REQUIRED, **present)
    assert problem.startswith(f"{section}: the section is missing; add it")
    assert f"{section}.{next(iter(GOOD[section]))}" in problem


# Sections, and parts of their one problem.
INVALID: list[tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = [
    ({"optimizer": {"lr": 0.0}}, ("optimizer.lr", "is 0.0", "greater than 0")),
    ({"optimizer": {"lr": float("inf")}}, ("optimizer.lr", "inf", "finite")),
    ({"optimizer": {"lr": "fast"}}, ("optimizer.lr", "'fast'", "number")),
    (
        {"optimizer": {"warmup_steps": 5, "warmup_fraction": 0.1}},
        ("optimizer.warmup_fraction", "no effect", "warmup_steps is set", "keep one"),
    ),
    (
        {"training": {"heartbeat_timeout_s": 5}},
        ("training.heartbeat_timeout_s", "is 5", "use 10 or more, or 0"),
    ),
    ({"optimizer": {"warmup_steps": -1}}, ("optimizer.warmup_steps", "is -1")),
    (
        {"optimizer": {"schedule": "constant", "min_lr": 1e-5}},
        ("optimizer.min_lr", "no effect", "constant", "leave it out"),
    ),
    ({"optimizer": {"min_lr": 1e-3}}, ("optimizer.min_lr", "0.001, above lr 0.0005", "lower")),
    ({"optimizer": {"schedule": "cosin"}}, ("optimizer.schedule", "'cosin'", "`cosine`")),
    ({"optimizer": {"beta2": 1.0}}, ("optimizer.beta2", "is 1.0", "less than 1")),
    ({"optimizer": {"learning_rate": 1.0}}, ("optimizer.learning_rate", "unknown field")),
    (
        {"training": {"recompute_layers": 2}},
        ("training.recompute_layers", "no effect", "recompute is off", "set recompute to full"),
    ),
    (
        {"training": {"recompute": "selective", "recompute_layers": 2}},
        ("training.recompute_layers", "no effect", "selective"),
    ),
    ({"training": {"memory_gb": 8}}, ("training.memory_gb", "no effect", "set recompute to auto")),
    ({"training": {"global_batch_pairs": 0}}, ("training.global_batch_pairs", "is 0")),
    ({"training": {"batch_pairs": 8}}, ("training.batch_pairs", "set training.global_batch_pairs")),
    (
        {"training": {"eval_every_steps": 10}},
        ("training.eval_every_steps", "is 10", "no held-out pairs", "data.eval"),
    ),
    (
        {"checkpoint": {"keep_best": 1}},
        ("checkpoint.keep_best", "is 1", "no held-out pairs", "data.eval_fraction"),
    ),
    (
        {"checkpoint": {"best_metric": "eval_rewards/margins"}},
        ("checkpoint.best_metric", "no effect", "keep_best is 0", "set keep_best"),
    ),
    ({"checkpoint": {"keep_last": 0}}, ("checkpoint.keep_last", "is 0", "greater than 0")),
    ({"checkpoint": {"resume": "always"}}, ("checkpoint.resume", "'always'", "auto")),
    ({"logging": {"every_steps": 0}}, ("logging.every_steps", "is 0")),
    ({"logging": {"wandb": {}}}, ("logging.wandb.project", "is missing", "project's name")),
    (
        {"logging": {"wandb": {"project": "p", "mode": "on"}}},
        ("logging.wandb.mode", "online, offline"),
    ),
    (
        {"data": {"row_tokens": 4097}, "layout": {"tensor": 2, "sequence_parallel": True}},
        ("data.row_tokens", "4097", "sequence parallelism", "use 4098"),
    ),
]


# checkpoint.every_steps, training.eval_every_steps, and parts of the problem of keep_best.
UNSCORED = [
    (100, None, "eval_every_steps is null: only the last", "eval_every_steps to 100"),
    (None, 40, "every_steps is null: only the last", "set checkpoint.every_steps to 40"),
    (None, None, "every_steps is null: only the last", "training.eval_every_steps to 100"),
    (100, 40, "100 steps are saved, and every 40 evaluated", "every_steps to 120, or training."),
    (40, 100, "40 steps are saved, and every 100 evaluated", "eval_every_steps to 40"),
]


@pytest.mark.parametrize(("save", "evaluate", "because", "remedy"), UNSCORED)
def test_keep_best_needs_steps_that_are_saved_and_evaluated(
    tmp_path, save, evaluate, because, remedy
):
    sections = {
        "data": {"eval": "held"},
        "training": {"eval_every_steps": evaluate},
        "checkpoint": {"keep_best": 2, "every_steps": save},
    }
    (message,) = problems_of(tmp_path, **sections)
    assert message.startswith("checkpoint.keep_best (run.yaml:")
    assert "is 2, but" in message and because in message and remedy in message, message


@pytest.mark.parametrize(("sections", "words"), INVALID)
def test_a_problem_has_location_value_and_remedy(tmp_path, sections, words):
    (message,) = problems_of(tmp_path, **sections)
    assert all(word in message for word in words), message
    assert "run.yaml" in message or "command line" in message, message


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"warmup_fraction": 0.1}},
        {"optimizer": {"min_lr": 5e-4}},
        {"optimizer": {"schedule": "linear", "min_lr": 1e-5, "clip_grad": 0.0}},
        {"training": {"recompute": "full", "recompute_layers": 2}},
        {"training": {"recompute": "full"}},
        {"training": {"recompute": "auto", "memory_gb": 8}},
        {"training": {"eval_every_steps": 10}, "data": {"eval_pairs": 5}},
        {"checkpoint": {"keep_best": 1, "best_metric": "eval_loss"},
         "training": {"eval_every_steps": 100}, "data": {"eval": "held"}},
        {"checkpoint": {"keep_best": 1}, "training": {"eval_every_steps": 25},
         "data": {"eval": "held"}},
        {"checkpoint": {"keep_best": 1}, "training": {"eval_every_steps": 200},
         "data": {"eval": "held"}},
        {"checkpoint": {"every_steps": None}},
        {"data": {"row_tokens": 4097}, "layout": {"tensor": 2}},
        {"data": {"row_tokens": 4098, "trim_tokens": 0},
         "layout": {"tensor": 2, "sequence_parallel": True}},
    ],
)  # fmt: skip
def test_valid_combinations(tmp_path, sections):
    load(tmp_path, **sections)


def test_all_problems_between_sections_are_reported_together(tmp_path):
    problems = problems_of(
        tmp_path,
        training={"eval_every_steps": 10},
        checkpoint={"keep_best": 1},
        reference={"source": "adapter_off"},
    )
    locations = ("training.eval_every_steps", "checkpoint.keep_best", "reference.source")
    assert len(problems) == 3
    assert all(any(location in problem for problem in problems) for location in locations)


def test_eval_every_steps_is_not_checked_without_data(tmp_path):
    training = {"output": "x", "eval_every_steps": 3}
    config = helper.load(tmp_path, required=["training"], training=training)
    assert config.training.eval_every_steps == 3
