"""The metrics of a step: the same numbers in every layout, on every rank, and a NaN arrives."""

import math
from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch

from megatron_idpo.mcore.parallel.layout import Layout
from megatron_idpo.objective.dpo import Objective, layer_loss
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.train.metrics.reduce import StepMetrics, reduce_outputs

NUM_LAYERS = 4
TAPS = (3, 1)
"""In the user's order, in which `layer_weights` are given."""

PAIRS = 7
MICRO_BATCHES = 3
"""On each data-parallel rank; one of them is empty."""

OBJECTIVE = Objective(intermediate_weight=0.3, layer_weights=(3.0, 1.0), nll_weight=0.5)

DIGITS = 1e-6
"""Losses of pairs are float32, everything after them float64."""


def numbers(layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy's and reference's log-probabilities of all sequences at a layer, and lengths."""
    random = torch.Generator().manual_seed(layer)
    policy, reference = (-50 * torch.rand(2 * PAIRS, generator=random) - 1 for _ in range(2))
    lengths = torch.arange(1, 2 * PAIRS + 1, dtype=torch.float32)
    return policy, reference, lengths


def rank_outputs(
    layers: list[int], data: int, data_size: int, spoil: tuple[int, int, float] | None
) -> tuple[list[LayerOutput], list[torch.Tensor]]:
    """What a rank's layers say of its pairs, over several micro-batches.

    Args:
        layers: the rank's.
        data: the data-parallel rank, which has every `data_size`-th pair.
        data_size: how many there are.
        spoil: a layer, a pair, and what its chosen log-probability is there.
    """
    outputs, lengths = [], []
    for index in range(MICRO_BATCHES):
        held = range(data + index * data_size, PAIRS, 2 * data_size) if index < 2 else []
        sequences = torch.tensor([2 * p + side for p in held for side in (0, 1)], dtype=torch.long)
        lengths.append(numbers(1)[2][sequences])
        for layer in layers:
            policy, reference, _ = numbers(layer)
            if spoil is not None and spoil[0] == layer:
                policy[2 * spoil[1]] = spoil[2]
            policy, reference = policy[sequences], reference[sequences]
            loss = layer_loss(policy, reference, lengths[-1], OBJECTIVE)
            outputs.append(LayerOutput(layer, index, policy, reference, loss))
    return outputs, lengths


def reduced(
    layout: Layout, spoil: tuple[int, int, float] | None = None
) -> tuple[StepMetrics, list[str]]:
    """This rank's reduction, and the collectives it took."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.groups import data_parallel_size, this_rank

    layout.start()
    rank = this_rank()
    own = [layer + 1 for layer in layout.layers(NUM_LAYERS, rank.pipeline)]
    layers = [layer for layer in own if layer in (*TAPS, NUM_LAYERS)]
    outputs, lengths = rank_outputs(layers, rank.data, data_parallel_size(), spoil)
    rank = dist.get_rank()
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce", "barrier")
    used: list[str] = []
    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():
        setattr(dist, name, partial(_noting, used, name, original))
    try:
        metrics = reduce_outputs(
            outputs,
            lengths,
            OBJECTIVE,
            TAPS,
            NUM_LAYERS,
            extra={"stop": float(rank == dist.get_world_size() - 1), "ranks": 1.0},
            peaks={"memory": 10.0 - rank, "negative": -1.0 - rank},
        )
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return metrics, used


def _noting(used: list[str], name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    used.append(name)
    return call(*args, **kwargs)


def expected() -> dict[str, float]:
    """The means over all pairs, computed plainly."""

    def means(layer: int) -> dict[str, float]:
        policy, reference, lengths = (tensor.double().numpy() for tensor in numbers(layer))
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
    pytest.param(Layout(tensor=2, pipeline=2), 4, id="tp2pp2"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_every_layout_has_the_same_metrics_on_every_rank(workers, layout, world_size):
    answers = workers.run(reduced, world_size, layout)
    for metrics, used in answers:
        assert used == ["all_reduce"]
        assert metrics.values() == pytest.approx(expected(), rel=DIGITS)
        assert metrics.pairs == PAIRS
        assert metrics.extra == {"stop": 1.0, "ranks": world_size}
        assert metrics.peaks == {"memory": 10.0, "negative": -1.0}
        assert metrics.not_finite() == {}
        assert metrics == answers[0][0]


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS[1:4])
def test_what_is_not_finite_arrives_everywhere_and_is_named(workers, layout, world_size):
    """Pair 1 is on the second data-parallel rank; layers 1 and 3 are on different stages."""
    spoilt = ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "nll_loss")
    for layer, value in ((1, math.nan), (3, math.nan), (NUM_LAYERS, -math.inf)):
        for metrics, _ in workers.run(reduced, world_size, layout, (layer, 1, value)):
            assert metrics.not_finite() == {layer: spoilt}
            assert not math.isfinite(metrics.values()["loss"])
            assert math.isfinite(metrics.values()["rewards/rejected"])


def step_metrics(pairs: int, loss: float, **others: Any) -> StepMetrics:
    """Metrics of a model with one tapped layer, whose loss is twice the final one's."""
    sums = {2: {"loss": 2 * loss}, 4: {"loss": loss}}
    return StepMetrics(pairs=pairs, sums=sums, scales={2: 0.5, 4: 0.5}, **others)


def test_batches_add_up_as_their_pairs_do():
    batches = [
        step_metrics(2, 2.0, extra={"n": 1.0}, peaks={"m": 5.0}),
        step_metrics(6, 2.0, extra={"n": 2.0}, peaks={"m": 3.0}),
        step_metrics(2, 1.0, extra={"n": 4.0}, peaks={"m": 4.0}),
    ]
    total = reduce(add, batches)
    assert total.pairs == 10
    assert total.values() == {"loss": 0.75, "final_loss": 0.5, "layer_2/loss": 1.0}
    assert (total.extra, total.peaks) == ({"n": 7.0}, {"m": 5.0})


def test_held_out_pairs_have_a_prefix_and_a_number():
    assert step_metrics(2, 1.0).evaluation_values() == {
        "eval_loss": 0.75,
        "eval_final_loss": 0.5,
        "eval_layer_2/loss": 1.0,
        "eval_pairs": 2.0,
    }


def test_a_nan_among_peaks_is_not_hidden():
    batches = [step_metrics(1, 1.0, peaks={"m": value}) for value in (math.nan, 1.0)]
    assert math.isnan(reduce(add, batches).peaks["m"])
    assert math.isnan(reduce(add, reversed(batches)).peaks["m"])
