"""The policy and its reference are built as configured."""

from typing import Any

import pytest
import torch

from .tiny_run import LORA, NUM_LAYERS, assembled, write_config

pytestmark = pytest.mark.distributed


def inspect(file: str) -> dict[str, Any]:
    """Properties of a policy and its reference."""
    from megatron_idpo.mcore.model.build import global_parameters

    with assembled(file) as trainer:
        policy, reference = trainer.policy, trainer.train_step.reference
        config = policy.chunks[0].config
        optimizer = policy.trainable.optimizer
        groups = optimizer.param_groups
        copy = getattr(reference, "_model", None)
        return {
            "trainable": [name for name, p in global_parameters(policy.chunks) if p.requires_grad],
            "adapters": policy.adapters and (policy.adapters.settings, policy.adapters.seed),
            "dtype": config.params_dtype,
            "recompute": (
                config.recompute_granularity,
                config.recompute_method,
                config.recompute_num_layers,
            ),
            "layers": policy.dpo.layers,
            "adam": {
                (group["betas"], group["eps"], group["weight_decay"])
                for group in groups
                if group["params"]
            },
            "clip": optimizer.config.clip_grad,
            "decays": {group["weight_decay"] for group in groups},
            "reference": type(reference).__name__,
            "is_reference_free": reference.is_reference_free,
            "copy_is_trainable": copy is not None
            and any(p.requires_grad for chunk in copy for p in chunk.parameters()),
        }


def build(workers: Any, tiny: Any, directory: Any, **sections: Any) -> dict[str, Any]:
    (properties,) = workers.run(inspect, 1, write_config(tiny, directory / "run", **sections))
    return properties


def test_full_training(tiny, workers, tmp_path):
    optimizer = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-5, "weight_decay": 0.2, "clip_grad": 3.0}
    policy = build(workers, tiny, tmp_path, optimizer=optimizer)
    assert len(policy["trainable"]) == 3 + 7 * NUM_LAYERS - 2 * NUM_LAYERS + NUM_LAYERS
    assert policy["adapters"] is None and policy["dtype"] == torch.float32
    assert policy["recompute"] == (None, None, None) and policy["layers"] == [1, 3]
    assert policy["adam"] == {((0.8, 0.9), 1e-5, 0.2), ((0.8, 0.9), 1e-5, 0.0)}
    assert policy["clip"] == 3.0
    assert (
        policy["reference"] == "Resident"
        and not policy["copy_is_trainable"]
        and not policy["is_reference_free"]
    )


def test_lora(tiny, workers, tmp_path):
    lora = {"rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ["v_proj", "q_proj"]}
    policy = build(workers, tiny, tmp_path, lora={**lora, "rslora": True}, training={"seed": 7})
    settings, seed = policy["adapters"]
    assert (settings.rank, settings.alpha, settings.dropout) == (3, 5.0, 0.1)
    assert settings.projections == ("q_proj", "v_proj") and settings.rslora and seed == 7
    assert policy["trainable"] == [] and policy["reference"] == "AdapterOff"


def test_reference_none(tiny, workers, tmp_path):
    policy = build(workers, tiny, tmp_path, reference={"source": "none"}, model={"dtype": "bf16"})
    assert policy["reference"] == "NoReference" and policy["is_reference_free"]
    assert policy["dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"recompute": "selective"}, ("selective", None, None)),
        ({"recompute": "full"}, ("full", "uniform", 1)),
        ({"recompute": "full", "recompute_layers": 2}, ("full", "block", 2)),
        ({"recompute": "full", "recompute_layers": 99}, ("full", "block", NUM_LAYERS)),
    ],
)
def test_recompute(tiny, workers, tmp_path, training, expected):
    policy = build(workers, tiny, tmp_path, training=training, lora=LORA)
    assert policy["recompute"] == expected
