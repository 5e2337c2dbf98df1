"""The learning rate of every step equals that of Transformers' schedules."""

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
    """Learning rates of a Transformers scheduler."""
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
    ("schedule", "make", "needs_total"),
    [
        ("cosine", get_cosine_schedule_with_warmup, True),
        ("linear", get_linear_schedule_with_warmup, True),
        ("constant", get_constant_schedule_with_warmup, False),
    ],
)
def test_schedule_equals_transformers(schedule, make, needs_total, warmup):
    expected = theirs(make, warmup, *([STEPS] if needs_total else []))
    assert ours(schedule=schedule, warmup_steps=warmup) == pytest.approx(expected, rel=1e-12)


def test_cosine_with_min_lr_equals_transformers():
    expected = theirs(
        get_cosine_with_min_lr_schedule_with_warmup, 3, STEPS, min_lr_rate=0.1
    )  # fmt: skip
    rates = ours(schedule="cosine", warmup_steps=3, min_lr=0.1 * LR)
    assert rates == pytest.approx(expected, rel=1e-12)


def test_linear_schedule_ends_near_min_lr():
    rates = ours(schedule="linear", min_lr=1e-4)
    assert rates[0] == LR and rates[-1] == pytest.approx(1e-4 + 4e-4 / STEPS)


@pytest.mark.parametrize(("fraction", "steps"), [(0.1, 4), (0.001, 1), (0.5, 19)])
def test_warmup_fraction_is_rounded_up(fraction, steps):
    rate = LearningRate(OptimizerConfig(lr=LR, warmup_fraction=fraction), STEPS)
    assert rate.warmup_steps == steps
    assert rate.at(steps) == LR > rate.at(steps - 1)


def test_warmup_longer_than_the_run_is_reported():
    message = (
        rf"optimizer\.warmup_steps: is {STEPS + 1}, but the run has {STEPS} steps; .* {STEPS}, or"
    )
    with pytest.raises(ConfigError, match=message):
        ours(warmup_steps=STEPS + 1)
    assert LearningRate(OptimizerConfig(lr=LR, warmup_fraction=0.9), 1).warmup_steps == 1
