"""Names: TRL's for the final layer, prefixed ones for the others, and back."""

import pytest

from megatron_idpo.train.metrics.names import dashboard_name, layer_name, layers_in


def test_layers_are_found_in_names():
    names = [layer_name(22, "loss"), "eval_layer_4/rewards/margins", "loss", "final_loss"]
    assert names[0] == "layer_22/loss"
    assert layers_in([*names, layer_name(22, "rewards/margins")]) == [4, 22]
    assert layers_in(["loss", "logps/chosen"]) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "train/loss"),
        ("rewards/margins", "train/rewards/margins"),
        ("layer_22/loss", "train/layer_22/loss"),
        ("eval_rewards/accuracies", "eval/rewards/accuracies"),
        ("throughput/mfu", "throughput/mfu"),
        ("memory/peak_gb", "memory/peak_gb"),
    ],
)
def test_dashboards_group_as_transformers_does(name, shown):
    assert dashboard_name(name) == shown
