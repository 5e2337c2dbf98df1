"""What learns, and what it is compared to, is what the configuration says."""

from typing import Any

import pytest
import torch

from .tiny_run import LORA, NUM_LAYERS, assembled, write_config

pytestmark = pytest.mark.distributed


def built(file: str) -> dict[str, Any]:
    """What there is to see of a policy and its reference."""
    from megatron_idpo.mcore.model.build import global_parameters

    with assembled(file) as run:
        policy, reference = run.trainer.policy, run.trainer.reference
        config = policy.chunks[0].config
        optimizer = policy.trainable.optimizer
        groups = optimizer.param_groups
        frozen_twin = getattr(reference, "_model", None)
        return {
            "learning": [name for name, p in global_parameters(policy.chunks) if p.requires_grad],
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
            "is_free": reference.is_free,
            "twin_learns": frozen_twin is not None
            and any(p.requires_grad for chunk in frozen_twin for p in chunk.parameters()),
        }


def look(workers: Any, tiny: Any, directory: Any, **sections: Any) -> dict[str, Any]:
    (found,) = workers.run(built, 1, write_config(tiny, directory / "run", **sections))
    return found


def test_all_weights(tiny, workers, tmp_path):
    optimizer = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-5, "weight_decay": 0.2, "clip_grad": 3.0}
    found = look(workers, tiny, tmp_path, optimizer=optimizer)
    assert len(found["learning"]) == 3 + 7 * NUM_LAYERS - 2 * NUM_LAYERS + NUM_LAYERS
    assert found["adapters"] is None and found["dtype"] == torch.float32
    assert found["recompute"] == (None, None, None) and found["layers"] == [1, 3]
    assert found["adam"] == {((0.8, 0.9), 1e-5, 0.2), ((0.8, 0.9), 1e-5, 0.0)}
    assert found["clip"] == 3.0
    assert found["reference"] == "Resident" and not found["twin_learns"] and not found["is_free"]


def test_adapters(tiny, workers, tmp_path):
    lora = {"rank": 3, "alpha": 5.0, "dropout": 0.1, "targets": ["v_proj", "q_proj"]}
    found = look(workers, tiny, tmp_path, lora={**lora, "rslora": True}, training={"seed": 7})
    settings, seed = found["adapters"]
    assert (settings.rank, settings.alpha, settings.dropout) == (3, 5.0, 0.1)
    assert settings.projections == ("q_proj", "v_proj") and settings.rslora and seed == 7
    assert found["learning"] == [] and found["reference"] == "AdapterOff"


def test_no_reference(tiny, workers, tmp_path):
    found = look(workers, tiny, tmp_path, reference={"source": "none"}, model={"dtype": "bf16"})
    assert found["reference"] == "NoReference" and found["is_free"]
    assert found["dtype"] == torch.bfloat16


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
    found = look(workers, tiny, tmp_path, training=training, lora=LORA)
    assert found["recompute"] == expected
