"""The learning rate of every step is Transformers'."""

from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from megatron_idpo.config.training import OptimizerConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.schedule import LearningRate

LR, STEPS = 5e-4, 37


def theirs(make: Any, *args: Any, **kwargs: Any) -> list[float]:
    """What a scheduler of Transformers sets for each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    scheduler = make(optimizer, *args, **kwargs)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(**settings: Any) -> list[float]:
    rate = LearningRate(OptimizerConfig(lr=LR, **settings), STEPS)
    return [rate.at(step) for step in range(STEPS)]


@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS])
@pytest.mark.parametrize(
    ("schedule", "make", "knows_the_end"),
    [
        ("cosine", get_cosine_schedule_with_warmup, True),
        ("linear", get_linear_schedule_with_warmup, True),
        ("constant", get_constant_schedule_with_warmup, False),
    ],
)
def test_every_schedule_is_transformers(schedule, make, knows_the_end, warmup):
    expected = theirs(make, warmup, *([STEPS] if knows_the_end else []))
    assert ours(schedule=schedule, warmup_steps=warmup) == pytest.approx(expected, rel=1e-12)


def test_a_cosine_with_a_floor_is_transformers_too():
    expected = theirs(
        get_cosine_with_min_lr_schedule_with_warmup, 3, STEPS, min_lr_rate=0.1
    )  # fmt: skip
    found = ours(schedule="cosine", warmup_steps=3, min_lr=0.1 * LR)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_line_with_a_floor_ends_near_it():
    found = ours(schedule="linear", min_lr=1e-4)
    assert found[0] == LR and found[-1] == pytest.approx(1e-4 + 4e-4 / STEPS)


@pytest.mark.parametrize(("fraction", "steps"), [(0.1, 4), (0.001, 1), (0.5, 19)])
def test_a_share_of_the_steps_is_rounded_up(fraction, steps):
    rate = LearningRate(OptimizerConfig(lr=LR, warmup_fraction=fraction), STEPS)
    assert rate.warmup_steps == steps
    assert rate.at(steps) == LR > rate.at(steps - 1)


def test_a_warm_up_ends_within_the_run():
    message = (
        rf"optimizer\.warmup_steps: is {STEPS + 1}, but the run has {STEPS} steps; .* {STEPS}, or"
    )
    with pytest.raises(ConfigError, match=message):
        ours(warmup_steps=STEPS + 1)
    assert LearningRate(OptimizerConfig(lr=LR, warmup_fraction=0.9), 1).warmup_steps == 1
