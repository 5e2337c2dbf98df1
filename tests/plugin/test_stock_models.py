"""Stock models with their own attention, padded and packed batches: equal to plain autograd.

Each case trains two steps with megatron-core's schedule, DDP and optimizer, several turns and
padding on both sides, and is compared with one graph per sequence on one rank (`stock_run.oracle`):
every layer's loss in every step, all gradients of the first step, all weights after the second, and
what Megatron's training loop would log.
"""

from typing import Any

import pytest
import torch

from . import stock_model as stock
from .covering import Rule, Space, cheap_cover, covering_array
from .stock_run import PAIRS, STEPS, TAPS, WEIGHT, Case, oracle, train

pytestmark = pytest.mark.distributed

LOSS_RELATIVE = 1e-5
GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| per tensor: fp32 sums in another order."""

UPDATE_RELATIVE = 1e-4
"""|difference| / |change in two steps| per tensor: the weights are 100 times larger than their
changes, so that is what fp32 keeps of them."""

SPACE = Space(
    {
        "tensor": (1, 2),
        "sequence_parallel": (False, True),
        "pipeline": (1, 2),
        "virtual": (1, 2),
        "data": (1, 2),
        "recompute": ("off", "selective", "uniform-3", "block-1"),
        "taps": tuple(TAPS),
        "trained": ("all", "frozen_head"),
        "tied": (False, True),
        "batch": ("padded", "packed"),
    },
    [
        Rule(("tensor", "sequence_parallel"), lambda t, split: not split or t > 1),
        Rule(("pipeline", "virtual"), lambda p, v: v == 1 or p > 1),
    ],
)
ARRAY = covering_array(SPACE)
CASES = [Case(**values) for values in ARRAY]
# Every value of every factor; processes cost most of a test's time.
QUICK = cheap_cover(ARRAY, 1, lambda values: Case(**values).world_size ** 2)
NORMAL = [
    Case(
        tensor=2,
        sequence_parallel=True,
        pipeline=2,
        virtual=2,
        recompute="block-1",
        taps="middle",
        batch="packed",
    ),
    Case(kind="gpt2", pipeline=2, per_token=True),  # biases, learned positions, LayerNorm
    Case(tensor=2, recompute="distributed"),
    Case(context=2),
    Case(context=2, taps="middle", per_token=True),
]
MORE = [
    Case(kind="gpt2", pipeline=2, virtual=2, tied=True, recompute="uniform-1"),
    Case(kind="gpt2", tensor=2, data=2, batch="packed", recompute="distributed"),
    Case(context=2, pipeline=2, batch="packed", recompute="uniform-3"),
    Case(context=2, data=2, tied=True, taps="middle"),
    Case(context=2, tensor=2, sequence_parallel=True, batch="packed", trained="frozen_head"),
    Case(context=4, taps="last"),
    Case(kind="gpt2", pipeline=2),
    Case(context=2, pipeline=2, per_token=True, tied=True),
    Case(data=2, pipeline=2, virtual=2, per_token=True, batch="packed"),
]
PARAMETERS = [
    *(pytest.param(case, id=str(case)) for case in NORMAL),
    *(pytest.param(case, id=str(case), marks=pytest.mark.exhaustive) for case in MORE),
    *(
        pytest.param(case, id=str(case), marks=() if n in QUICK else pytest.mark.exhaustive)
        for n, case in enumerate(CASES)
    ),
]


@pytest.fixture(scope="module")
def expected_of(workers):
    """Trainings by plain autograd, each computed once."""
    known: dict[Any, dict[str, Any]] = {}

    def of(case: Case) -> dict[str, Any]:
        key = (case.layers, case.tied, case.trained, case.kind)
        if key not in known:
            (known[key],) = workers.run(oracle, 1, *key)
        return known[key]

    return of


@pytest.mark.parametrize("case", PARAMETERS)
def test_training_equals_plain_autograd(workers, expected_of, case):
    expected = expected_of(case)
    by_rank = workers.run(train, case.world_size, case)
    worst: dict[str, tuple[float, str]] = {"loss": (0, ""), "gradient": (0, ""), "update": (0, "")}

    def compare(kind: str, name: str, own: torch.Tensor, want: torch.Tensor, size: float) -> None:
        difference = float((own - want).norm()) / size
        if not difference <= worst[kind][0]:  # also if it is NaN
            worst[kind] = (difference, name)

    copies = case.world_size // (case.pipeline * case.data)
    for step in range(STEPS):
        for layer, loss in expected["losses"][step].items():
            own = [r["losses"][step][layer] for r in by_rank if layer in r["losses"][step]]
            assert len(own) == copies * case.data
            name = f"step {step} layer {layer}"
            compare("loss", name, torch.stack(own).sum() / copies, loss, float(loss))
    seen = set()
    for answer in by_rank:
        for name, own in answer["weights"].items():
            is_tied_copy = case.tied and name == "output_layer.weight"
            whole = "embedding.word_embeddings.weight" if is_tied_copy else name
            want, start, gradient = (
                stock.cut(name, expected[kind][whole], answer["cuts"][name])
                if whole in expected[kind]
                else None
                for kind in ("weights", "start", "gradients")
            )
            seen.add(whole)
            if gradient is None:
                assert torch.equal(own, start), f"{name} is frozen"
                continue
            assert gradient.any(), name
            compare("gradient", name, answer["gradients"][name], gradient, float(gradient.norm()))
            compare("update", name, own, want, float((want - start).norm()))
    assert seen == set(expected["weights"])
    assert worst["loss"][0] <= LOSS_RELATIVE, worst
    assert worst["gradient"][0] <= GRADIENT_RELATIVE, worst
    assert worst["update"][0] <= UPDATE_RELATIVE, worst
    check_logs(
        case, [answer["logs"] for answer in by_rank if answer["logs"][0]], expected["losses"]
    )


def check_logs(case: Case, logs_by_rank: list[Any], losses_by_step: list[Any]) -> None:
    """Megatron's training loop prints the mean of every layer's loss."""
    assert len(logs_by_rank) == case.world_size // case.pipeline, "on the last stage"
    for logs in logs_by_rank:
        for log, losses in zip(logs, losses_by_step, strict=True):
            *taps, final = (float(loss) / PAIRS for loss in losses.values())
            assert log["final loss"] == pytest.approx(final, rel=LOSS_RELATIVE)
            for layer, loss in zip(case.layers, taps, strict=True):
                assert log[f"layer {layer} loss"] == pytest.approx(loss, rel=LOSS_RELATIVE)
            combined = (1 - WEIGHT) * final + WEIGHT * sum(taps) / len(taps)
            assert log["loss"] == pytest.approx(combined, rel=LOSS_RELATIVE)
            assert log["rewards/margins"] == pytest.approx(
                log["rewards/chosen"] - log["rewards/rejected"], rel=1e-4
            )
