"""Where policy and reference should be equal before the first step, and that they are looked at."""

from typing import Any

import pytest
import torch

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.run_config import load_config
from megatron_idpo.errors import TrainingError
from megatron_idpo.train.start_check import BF16_LOGP_TOLERANCE, is_expected

from .tiny_run import LAYERS, LORA, NUM_LAYERS, Files, assembled, write_config

FINAL = {"objective": {"reference_layer": "final"}}


@pytest.mark.parametrize(
    ("sections", "starts_there", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"lora": LORA}, True, True),
        ({"objective": {"layers": [], "intermediate_weight": 0.0}}, True, True),
        ({"objective": {"loss": "ipo", "nll_weight": 0.5}}, True, True),
        ({"training": {"start_check": False}}, True, False),
        ({"reference": {"source": "none"}}, True, False),
        (FINAL, True, True),
        (FINAL, False, False),
    ],
)
def test_when_it_is_expected(tmp_path, sections, starts_there, expected):
    file = write_config(Files(tmp_path), tmp_path / "run", **sections)
    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    assert is_expected(config, starts_at_reference=starts_there) is expected


def checked(file: str, spoil: float = 0.0) -> dict[int, float] | str:
    """What the check finds where a weight of layer 3 is off by so much, as a share of itself."""
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.train.start_check import check_start

    with assembled(file) as run:
        for name, parameter in global_parameters(run.trainer.policy.chunks):
            if name == "decoder.layers.2.mlp.linear_fc2.weight":
                parameter.data.mul_(1 + spoil)
        before = [p.clone() for chunk in run.trainer.policy.chunks for p in chunk.parameters()]
        try:
            losses: Any = check_start(run.trainer, run.pairs.train, run.rows, seed=3)
        except TrainingError as error:
            losses = str(error)
        after = [p for chunk in run.trainer.policy.chunks for p in chunk.parameters()]
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
        return losses


LN_2, ALL_LAYERS = 0.6931472, (*LAYERS, NUM_LAYERS)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sections", "processes"),
    [
        ({}, 1),
        ({"lora": {**LORA, "dropout": 0.5}, "layout": {"pipeline": 2}}, 2),
        pytest.param({"model": {"dtype": "bf16"}}, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_equal_models_have_the_loss_at_zero_everywhere(
    tiny, workers, tmp_path, sections, processes
):
    file = write_config(tiny, tmp_path / "run", **sections)
    for losses in workers.run(checked, processes, file):
        assert losses == pytest.approx(dict.fromkeys(ALL_LAYERS, LN_2), abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("loss", "expected"), [("ipo", (1 / (2 * 0.3)) ** 2), ("hinge", 1.0), ("sigmoid_norm", LN_2)]
)
def test_every_loss_has_its_own_value_at_zero(tiny, workers, tmp_path, loss, expected):
    """The auxiliary likelihood loss does not count."""
    file = write_config(tiny, tmp_path / "run", objective={"loss": loss, "nll_weight": 1.0})
    (losses,) = workers.run(checked, 1, file)
    assert losses == pytest.approx(dict.fromkeys(ALL_LAYERS, expected), rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_difference_is_told_at_the_layers_that_have_it(tiny, workers, tmp_path, dtype):
    file = write_config(tiny, tmp_path / "run", model={"dtype": dtype})
    (message,) = workers.run(checked, 1, file, spoil=-1.0)
    assert isinstance(message, str) and message.startswith("start check: policy and reference")
    assert (
        "layer 3: loss" in message and "layer 4: loss" in message and "layer 1: loss" not in message
    )


@pytest.mark.distributed
def test_a_small_difference_is_seen_in_fp32(tiny, workers, tmp_path):
    """A hundredth of one weight matrix; bf16 has to allow for its own rounding."""
    (message,) = workers.run(checked, 1, write_config(tiny, tmp_path / "run"), spoil=0.01)
    assert isinstance(message, str)
    assert 0 < BF16_LOGP_TOLERANCE < 0.05
