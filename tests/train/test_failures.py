"""A number that is none is told with step, layers and pairs, on every rank."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_idpo.errors import TrainingError
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.train.finite_checks import refuse_bad_gradient, refuse_bad_losses
from megatron_idpo.train.metrics.reduce import StepMetrics

NAN, INF = float("nan"), float("inf")


@dataclass
class Held:
    """As much of a row as is looked at."""

    pair_index_P: Any


def metrics(**sums: float) -> StepMetrics:
    """Of two layers: `loss_1`, `margins_2` and so on; 0 where nothing is said."""
    quantities = {"loss": "loss", "margins": "rewards/margins"}
    by_layer = {
        layer: {name: sums.get(f"{short}_{layer}", 0.0) for short, name in quantities.items()}
        for layer in (1, 2)
    }
    return StepMetrics(pairs=6, sums=by_layer, scales={1: 0.5, 2: 0.5})


def judge(bad: dict[int, list[int]], **sums: float) -> str:
    """What this rank is told where these pairs of some ranks have no loss."""
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = [Held(np.array([10 * rank, 10 * rank + 1])), Held(np.array([10 * rank + 2]))]
    outputs = []
    for index, row in enumerate(rows):
        loss_P = torch.zeros(len(row.pair_index_P))
        for location, pair in enumerate(row.pair_index_P.tolist()):
            if pair in bad.get(rank, []):
                loss_P[location] = NAN
        outputs += [LayerOutput(layer, index, loss_P, None, loss_P) for layer in (1, 2)]
    try:
        refuse_bad_losses(metrics(**sums), outputs, rows, 7, "file:{}".format)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_all_is_well(workers):
    assert workers.run(judge, 2, {}) == ["", ""]


@pytest.mark.distributed
def test_every_rank_hears_of_all_pairs(workers):
    message = workers.run(judge, 2, {0: [2, 1], 1: [10]}, loss_1=NAN, margins_1=INF, loss_2=NAN)
    expected = (
        "step 7: NaN or infinite at layer 1 (loss, rewards/margins); layer 2 (loss), "
        "in the pairs file:1, file:2, file:10; lower optimizer.lr, warm up longer, or compute in "
        "fp32 (model.dtype)"
    )
    assert message == [expected] * 2


@pytest.mark.distributed
def test_of_many_pairs_the_first_are_named(workers):
    (message, _) = workers.run(judge, 2, {0: [0, 1, 2], 1: [10, 11, 12]}, loss_2=INF)
    assert "file:0, file:1, file:2, file:10, file:11 and 1 more;" in message
    assert "layer 1" not in message


@pytest.mark.distributed
def test_where_only_a_metric_is_infinite_no_pair_is_named(workers):
    (message,) = workers.run(judge, 1, {}, margins_2=INF)
    assert "at layer 2 (rewards/margins); lower" in message


@pytest.mark.parametrize("norm", [NAN, INF])
def test_a_gradient_that_is_no_number(norm):
    with pytest.raises(TrainingError, match=f"^step 3: the gradient's norm is {norm}, though"):
        refuse_bad_gradient(norm, 3)


def test_a_gradient_that_is_one():
    refuse_bad_gradient(0.0, 3)
    refuse_bad_gradient(1e30, 3)
