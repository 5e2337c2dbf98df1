"""NaN and infinity are reported with step, layers and pairs, on every rank."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_idpo.errors import TrainingError
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.train.finite_checks import check_gradient_finite, check_losses_finite
from megatron_idpo.train.metrics.reduce import StepMetrics

NAN, INF = float("nan"), float("inf")


@dataclass
class FakeRow:
    """The part of a row that is read."""

    pair_index_P: Any


def metrics(**sums: float) -> StepMetrics:
    """Of two layers: `loss_1`, `margins_2` and so on; the others are 0."""
    quantities = {"loss": "loss", "margins": "rewards/margins"}
    by_layer = {
        layer: {name: sums.get(f"{short}_{layer}", 0.0) for short, name in quantities.items()}
        for layer in (1, 2)
    }
    return StepMetrics(pairs=6, sums=by_layer, scales={1: 0.5, 2: 0.5})


def check(bad: dict[int, list[int]], **sums: float) -> str:
    """The error message on this rank if these pairs have a NaN loss; `bad` is by rank."""
    import torch.distributed as dist

    rank = dist.get_rank()
    rows = [FakeRow(np.array([10 * rank, 10 * rank + 1])), FakeRow(np.array([10 * rank + 2]))]
    outputs = []
    for index, row in enumerate(rows):
        loss_P = torch.zeros(len(row.pair_index_P))
        for position, pair in enumerate(row.pair_index_P.tolist()):
            if pair in bad.get(rank, []):
                loss_P[position] = NAN
        outputs += [LayerOutput(layer, index, loss_P, None, loss_P) for layer in (1, 2)]
    try:
        check_losses_finite(metrics(**sums), outputs, rows, 7, "file:{}".format)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_finite_losses_pass(workers):
    assert workers.run(check, 2, {}) == ["", ""]


@pytest.mark.distributed
def test_pairs_of_all_ranks_are_reported_on_every_rank(workers):
    messages = workers.run(check, 2, {0: [2, 1], 1: [10]}, loss_1=NAN, margins_1=INF, loss_2=NAN)
    expected = (
        "step 7: NaN or infinite at layer 1 (loss, rewards/margins); layer 2 (loss), "
        "in the pairs file:1, file:2, file:10; lower optimizer.lr, warm up longer, or compute in "
        "fp32 (model.dtype)"
    )
    assert messages == [expected] * 2


@pytest.mark.distributed
def test_at_most_five_pairs_are_named(workers):
    (message, _) = workers.run(check, 2, {0: [0, 1, 2], 1: [10, 11, 12]}, loss_2=INF)
    assert "file:0, file:1, file:2, file:10, file:11 and 1 more;" in message
    assert "layer 1" not in message


@pytest.mark.distributed
def test_no_pair_is_named_if_all_losses_are_finite(workers):
    (message,) = workers.run(check, 1, {}, margins_2=INF)
    assert "at layer 2 (rewards/margins); lower" in message


@pytest.mark.parametrize("norm", [NAN, INF])
def test_nan_gradient_norm_is_reported(norm):
    with pytest.raises(TrainingError, match=f"^step 3: the gradient norm is {norm}, although"):
        check_gradient_finite(norm, 3)


def test_finite_gradient_norm_passes():
    check_gradient_finite(0.0, 3)
    check_gradient_finite(1e30, 3)
