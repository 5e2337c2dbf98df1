"""Reduction of metrics: equal in every layout and on every rank; NaN is not lost."""

import math
from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.train.metrics.flops import BatchWork
from megatron_idpo.train.metrics.reduce import StepMetrics, reduce_outputs

NUM_LAYERS = 4
TAPS = (3, 1)
"""In the order of `layer_weights`."""

PAIRS = 7
MICRO_BATCHES = 3
"""On each data-parallel rank; the last is empty."""

OBJECTIVE = Objective(intermediate_weight=0.3, layer_weights=(3.0, 1.0), nll_weight=0.5)

TOLERANCE = 1e-6
"""Relative: losses of pairs are float32, the sums float64."""


def logps(layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of policy and reference of all sequences at a layer, and lengths."""
    random = torch.Generator().manual_seed(layer)
    policy, reference = (-50 * torch.rand(2 * PAIRS, generator=random) - 1 for _ in range(2))
    lengths = torch.arange(1, 2 * PAIRS + 1, dtype=torch.float32)
    return policy, reference, lengths


def rank_outputs(
    layers: list[int], data: int, data_size: int, spoil: tuple[int, int, float] | None
) -> list[LayerOutput]:
    """Outputs of a rank's layers over several micro-batches.

    Args:
        layers: of the rank.
        data: the data-parallel rank, which has every `data_size`-th pair.
        data_size: number of data-parallel ranks.
        spoil: layer, pair, and the value to set as its chosen log-probability.
    """
    outputs = []
    for index in range(MICRO_BATCHES):
        held = range(data + index * data_size, PAIRS, 2 * data_size) if index < 2 else []
        sequences = torch.tensor([2 * p + side for p in held for side in (0, 1)], dtype=torch.long)
        lengths = logps(1)[2][sequences]
        for layer in layers:
            policy, reference, _ = logps(layer)
            if spoil is not None and spoil[0] == layer:
                policy[2 * spoil[1]] = spoil[2]
            policy, reference = policy[sequences], reference[sequences]
            loss = layer_loss(policy, reference, lengths, OBJECTIVE)
            outputs.append(LayerOutput(layer, index, policy, reference, loss, lengths))
    return outputs


def reduce_on_rank(
    layout: Layout, spoil: tuple[int, int, float] | None = None, stop_rank: int | None = None
) -> tuple[StepMetrics, list[str]]:
    """This rank's metrics, and the collectives that were called."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import (
        data_parallel_size,
        rank_coordinates,
        start_layout,
    )

    start_layout(layout)
    rank = rank_coordinates()
    own = [layer + 1 for layer in layout.layers(NUM_LAYERS, rank.pp_rank)]
    layers = [layer for layer in own if layer in (*TAPS, NUM_LAYERS)]
    outputs = rank_outputs(layers, rank.dp_rank, data_parallel_size(), spoil)
    rank = dist.get_rank()
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce", "barrier")
    used: list[str] = []
    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():
        setattr(dist, name, partial(_recording, used, name, original))
    try:
        metrics = reduce_outputs(
            outputs,
            OBJECTIVE,
            TAPS,
            NUM_LAYERS,
            work=BatchWork(pairs=3.0, attended=0.5),
            stop_requested=stop_rank == rank,
            peak_memory_bytes=10.0 - rank,
        )
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return metrics, used


def _recording(
    used: list[str], name: str, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    used.append(name)
    return call(*args, **kwargs)


def expected() -> dict[str, float]:
    """Means over all pairs, computed with NumPy."""

    def means(layer: int) -> dict[str, float]:
        policy, reference, lengths = (tensor.double().numpy() for tensor in logps(layer))
        rewards = OBJECTIVE.beta * (policy - reference)
        margins = rewards[0::2] - rewards[1::2]
        nll = -policy[0::2] / lengths[0::2]
        loss = np.log1p(np.exp(-margins)) + OBJECTIVE.nll_weight * nll
        named = {
            "loss": loss,
            "rewards/chosen": rewards[0::2],
            "rewards/rejected": rewards[1::2],
            "rewards/accuracies": margins > 0,
            "rewards/margins": margins,
            "logps/chosen": policy[0::2],
            "logps/rejected": policy[1::2],
            "nll_loss": nll,
        }
        return {name: float(values.mean()) for name, values in named.items()}

    final = means(NUM_LAYERS)
    combined = 0.7 * final["loss"] + 0.3 * (0.75 * means(3)["loss"] + 0.25 * means(1)["loss"])
    values = {**final, "loss": combined, "final_loss": final["loss"]}
    for layer in TAPS:
        values |= {f"layer_{layer}/{name}": value for name, value in means(layer).items()}
    return values


LAYOUTS = [
    pytest.param(Layout(), 1, id="one"),
    pytest.param(Layout(pipeline=2), 2, id="pp2"),
    pytest.param(Layout(tensor=2), 2, id="tp2"),
    pytest.param(Layout(), 2, id="dp2"),
    pytest.param(Layout(tensor=2, pipeline=2), 4, id="tp2pp2", marks=pytest.mark.exhaustive),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_metrics_are_equal_in_every_layout_and_on_every_rank(workers, layout, world_size):
    replicas = world_size // (layout.tensor * layout.pipeline)
    results = workers.run(reduce_on_rank, world_size, layout)
    for metrics, used in results:
        assert used == ["all_reduce"]
        assert metrics.values() == pytest.approx(expected(), rel=TOLERANCE)
        assert metrics.pairs == PAIRS
        # Each model replica counts its rows once.
        assert metrics.work == BatchWork(pairs=3.0 * replicas, attended=0.5 * replicas)
        assert metrics.peak_memory_bytes == 10.0 and not metrics.stop_requested
        assert metrics.not_finite() == {}
        assert metrics == results[0][0]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2)])
def test_stop_request_of_any_rank_reaches_all(workers, layout):
    for metrics, _ in workers.run(reduce_on_rank, 2, layout, None, 1):
        assert metrics.stop_requested


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS[1:4])
def test_nan_reaches_every_rank_with_its_layer(workers, layout, world_size):
    """Pair 1 is on the second data-parallel rank; layers 1 and 3 are on different stages."""
    bad_names = ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "nll_loss")
    for layer, value in ((1, math.nan), (3, math.nan), (NUM_LAYERS, -math.inf)):
        for metrics, _ in workers.run(reduce_on_rank, world_size, layout, (layer, 1, value)):
            assert metrics.not_finite() == {layer: bad_names}
            assert not math.isfinite(metrics.values()["loss"])
            assert math.isfinite(metrics.values()["rewards/rejected"])


def step_metrics(pairs: int, loss: float, **others: Any) -> StepMetrics:
    """Of a model with one tapped layer, whose loss is twice the final layer's."""
    sums = {2: {"loss": 2 * loss}, 4: {"loss": loss}}
    return StepMetrics(pairs=pairs, sums=sums, scales={2: 0.5, 4: 0.5}, **others)


def test_batches_are_added_by_pairs():
    batches = [
        step_metrics(2, 2.0, work=BatchWork(pairs=1), peak_memory_bytes=5.0),
        step_metrics(6, 2.0, work=BatchWork(pairs=2), peak_memory_bytes=3.0, stop_requested=True),
        step_metrics(2, 1.0, work=BatchWork(pairs=4), peak_memory_bytes=4.0),
    ]
    total = reduce(add, batches)
    assert total.pairs == 10
    assert total.values() == {"loss": 0.75, "final_loss": 0.5, "layer_2/loss": 1.0}
    assert (total.work.pairs, total.peak_memory_bytes, total.stop_requested) == (7, 5.0, True)


def test_evaluation_values_have_a_prefix_and_the_number_of_pairs():
    assert step_metrics(2, 1.0).evaluation_values() == {
        "eval_loss": 0.75,
        "eval_final_loss": 0.5,
        "eval_layer_2/loss": 1.0,
        "eval_pairs": 2.0,
    }
