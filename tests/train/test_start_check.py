"""The start check: when it runs, and which differences of policy and reference it reports."""

from typing import Any

import pytest
import torch

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.errors import TrainingError
from megatron_idpo.train.start_check import FP32_LOGP_TOLERANCE, is_start_check_due

from .tiny_run import LORA, Files, assembled, write_config

FINAL = {"objective": {"reference_layer": "final"}}


@pytest.mark.parametrize(
    ("sections", "starts_at_reference", "expected"),
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
def test_when_the_check_is_due(tmp_path, sections, starts_at_reference, expected):
    file = write_config(Files(tmp_path), tmp_path / "run", **sections)
    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    assert is_start_check_due(config, starts_at_reference=starts_at_reference) is expected


def check(file: str, scale: float = 1.0) -> float | str:
    """Result or error of the check with a weight matrix of layer 3 scaled."""
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.train.start_check import check_start

    with assembled(file) as trainer:
        for name, parameter in global_parameters(trainer.policy.chunks):
            if name == "decoder.layers.2.mlp.linear_fc2.weight":
                parameter.data.mul_(scale)
        before = [p.clone() for chunk in trainer.policy.chunks for p in chunk.parameters()]
        try:
            result: Any = check_start(
                trainer.train_step,
                trainer.pairs.train,
                trainer.rows,
                seed=3,
                global_batch_pairs=trainer.config.training.global_batch_pairs,
            )
            result = result[0]
        except TrainingError as error:
            result = str(error)
        after = [p for chunk in trainer.policy.chunks for p in chunk.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
        return result


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sections", "processes"),
    [
        ({}, 1),
        ({"lora": {**LORA, "dropout": 0.5}, "layout": {"pipeline": 2}}, 2),
        pytest.param({"model": {"dtype": "bf16"}}, 2, marks=pytest.mark.exhaustive),
        ({"model": {"dtype": "bf16"}, "reference": {"source": "cache"}}, 1),
        ({"model": {"dtype": "bf16"}, "reference": {"source": "resident"}, "lora": LORA}, 1),
    ],
)
def test_equal_models_pass(tiny, workers, tmp_path, sections, processes):
    file = write_config(tiny, tmp_path / "run", **sections)
    for difference in workers.run(check, processes, file):
        assert 0 <= difference <= FP32_LOGP_TOLERANCE
        if "reference" in sections:  # computed on the same rows by the same kernels
            assert difference == 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("loss", "expected"),
    [("ipo", (1 / (2 * 0.3)) ** 2), ("hinge", 1.0), ("sigmoid_norm", 0.693147)],
)
def test_error_names_the_expected_loss(tiny, workers, tmp_path, loss, expected):
    """Without the NLL term, which is not 0 at equal models."""
    file = write_config(tiny, tmp_path / "run", objective={"loss": loss, "nll_weight": 1.0})
    (difference,) = workers.run(check, 1, file)
    assert difference <= FP32_LOGP_TOLERANCE
    (message,) = workers.run(check, 1, file, scale=0.0)
    assert f"(every layer's loss {expected:.6f})" in message


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_difference_is_reported_at_its_layers(tiny, workers, tmp_path, dtype):
    file = write_config(tiny, tmp_path / "run", model={"dtype": dtype})
    (message,) = workers.run(check, 1, file, scale=0.0)
    assert isinstance(message, str) and message.startswith("start check: policy and reference")
    assert "layer 3 (loss" in message and "layer 4 (loss" in message
    assert "layer 1 (loss" not in message


@pytest.mark.distributed
def test_small_difference_is_reported_in_fp32(tiny, workers, tmp_path):
    """One weight matrix scaled by 1 %; bf16 must allow for its rounding."""
    (message,) = workers.run(check, 1, write_config(tiny, tmp_path / "run"), scale=1.01)
    assert isinstance(message, str)
