"""Settings: scale, targets as users write them, and everything wrong in one error."""

import math
from typing import Any

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.lora.settings import PROJECTIONS, LoraSettings, resolve_targets


def test_the_scale():
    assert LoraSettings(rank=8, alpha=16.0).scaling == 2.0
    assert LoraSettings(rank=8, alpha=16.0, use_rslora=True).scaling == 16 / math.sqrt(8)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("all-linear", PROJECTIONS),
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        (["down", "q"], ("q_proj", "down_proj")),
        ("gate", ("gate_proj",)),
        (("k", "v_proj", "o", "up"), ("k_proj", "v_proj", "o_proj", "up_proj")),
    ],
)
def test_targets_are_what_users_write(given, meant):
    assert resolve_targets(given) == meant


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["q", "w", "lm_head"], ["there is no linear 'w'", "there is no linear 'lm_head'"]),
        (["q", "q_proj"], ["q_proj is named twice"]),
        ([], ["is empty"]),
        ("all", ["there is no linear 'all'", "or write all-linear"]),
    ],
)
def test_unknown_targets_are_named(given, message):
    with pytest.raises(ConfigError) as error:
        resolve_targets(given)
    assert all(part in str(error.value) for part in message)


@pytest.mark.parametrize(
    ("fields", "location"),
    [
        ({"rank": 0}, "lora.rank: is 0"),
        ({"rank": 2.5}, "lora.rank: is 2.5"),
        ({"rank": True}, "lora.rank: is True"),
        ({"alpha": 0.0}, "lora.alpha: is 0.0"),
        ({"alpha": math.inf}, "lora.alpha: is inf"),
        ({"alpha": math.nan}, "lora.alpha: is nan"),
        ({"dropout": 1.0}, "lora.dropout: is 1.0"),
        ({"dropout": -0.1}, "lora.dropout: is -0.1"),
        ({"targets": ("q",)}, "lora.targets: is ['q']"),
        ({"targets": ()}, "lora.targets: is []"),
        ({"targets": ("q_proj", "q_proj")}, "lora.targets: is ['q_proj', 'q_proj']"),
    ],
)
def test_values_are_checked(fields: dict[str, Any], location):
    with pytest.raises(ConfigError) as error:
        LoraSettings(**fields)
    assert location in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError, match="4 problems"):
        LoraSettings(rank=-1, alpha=-1.0, dropout=2.0, targets=("all-linear",))
