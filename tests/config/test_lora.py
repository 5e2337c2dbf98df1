"""The section `lora`: its values, and which projections they select."""

import math
from typing import Any

import pytest

from megatron_idpo.config.lora import PROJECTIONS, LoraConfig
from megatron_idpo.errors import ConfigError

from .helper import load, problems_of


def test_scaling():
    assert LoraConfig(rank=8, alpha=16.0).scaling == 2.0
    assert LoraConfig(rank=8, alpha=16.0, rslora=True).scaling == 16 / math.sqrt(8)


def test_projections_are_in_the_order_of_the_forward_pass():
    assert LoraConfig().projections == PROJECTIONS
    assert LoraConfig(targets=("v_proj", "q_proj")).projections == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank: is 0"),
        ({"rank": 2.5}, "lora.rank: is 2.5"),
        ({"rank": True}, "lora.rank: is True"),
        ({"alpha": 0.0}, "lora.alpha: is 0.0"),
        ({"alpha": math.inf}, "lora.alpha: is inf"),
        ({"alpha": math.nan}, "lora.alpha: is nan"),
        ({"dropout": 1.0}, "lora.dropout: is 1.0"),
        ({"dropout": -0.1}, "lora.dropout: is -0.1"),
        ({"targets": ("q",)}, "lora.targets: is ('q',); give all-linear, or a list of q_proj"),
        ({"targets": "q_proj"}, "lora.targets: is 'q_proj'; give all-linear, or a list of"),
        ({"targets": 3}, "lora.targets: is 3; give all-linear, or a list of"),
        ({"targets": ()}, "lora.targets: is (); give all-linear, or a list of"),
        (
            {"target_parameters": ("mlp.experts.gate_up_proj",), "dropout": 0.1},
            "lora.dropout: is 0.1 with lora.target_parameters; PEFT has no dropout for experts",
        ),
        (
            {"gate_up_rank": 8},
            "lora.gate_up_rank: is 8; add mlp.experts.gate_up_proj to lora.target",
        ),
        (
            {"target_parameters": ("mlp.experts.w1",)},
            "lora.target_parameters.0: is 'mlp.experts.w1'",
        ),
        (
            {"targets": ("q_proj", "q_proj")},
            "lora.targets: is ('q_proj', 'q_proj'); give all-linear",
        ),
    ],
)
def test_invalid_fields_are_reported(fields: dict[str, Any], message):
    with pytest.raises(ConfigError) as error:
        LoraConfig(**fields)
    assert message in str(error.value)


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError, match="3 problems"):
        LoraConfig(rank=-1, alpha=-1.0, dropout=2.0)


def test_a_list_of_targets_in_yaml(tmp_path):
    config = load(tmp_path, lora={"targets": ["v_proj"], "adapter": "some/adapter"})
    assert config.lora == LoraConfig(targets=("v_proj",), adapter="some/adapter")
    assert load(tmp_path, lora={"targets": "all-linear"}).lora == LoraConfig()
    (problem,) = problems_of(tmp_path, lora={"targets": ["q_prj"]})
    assert problem.startswith("lora.targets (run.yaml:") and "'q_prj'" in problem
