"""On megatron-core's schedules: scoring, the first step, eval mode, experts, bf16, loss scale.

Scoring is compared with `tests/oracle.py`, layouts with one rank. Training is compared with the
oracle in `test_attach.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.objective.dpo import Objective, loss_at_zero
from megatron_idpo.testing import write_tiny_hf_model
from tests import oracle

from . import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

LOGPS_ABSOLUTE = 2e-5
"""fp32 sums over at most 4 tokens' log-softmax, layers in another order of summation."""

START_ABSOLUTE = 1e-6
"""Policy and reference have the same weights, so only rounding may differ."""

GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| of each tensor: fp32 sums in another order."""

BF16_RELATIVE = 2e-2
"""bf16 keeps 8 bits, so a sum is off by 2^-9; where a stage ends, the gradients of a tap and of the
layers above meet in another order, and a few roundings differ. Measured: 8.1e-3, for the embedding.
"""

BF16_ERROR_GROWTH = 1.5
"""Allowed error of two stages against fp32, relative to that of one rank (2.1e-2, rounding)."""

PLAIN = Layout()
STAGES = Layout(pipeline=2)
INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)
TENSOR = Layout(tensor=2, sequence_parallel=True)


def attached(chunks: Any, layers: Any, objective: Objective | None = None) -> Any:
    from megatron_idpo.plugin.attach import attach

    objective = objective or Objective(beta=0.3, intermediate_weight=0.4)
    return attach(chunks, layers=layers, objective=objective, vocab_size=tiny.VOCAB)


# ---- scoring -------------------------------------------------------------------------------------


def score(directory: str, layout: Layout, training: bool, options: Any) -> dict[int, Tensor]:
    """Log-probabilities of all local layers, forward only, without reference."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    checkpoint, architecture = open_hf(Path(directory))
    start_layout(layout)
    chunks = build_model(architecture, layout, options)
    load_hf_weights(chunks, checkpoint, architecture)
    for chunk in chunks:
        chunk.train(training)
    dpo = attached(chunks, "all")
    # Scoring needs no counts, because no loss is averaged.
    batches = tiny.micro_batches(None, num_micro_batches=0, global_pairs=0)
    outputs = tiny.run(dpo, chunks, batches, forward_only=True)
    assert all(out.loss_P is None and out.reference_logps_2P is None for out in outputs)
    assert not any(out.logps_2P.requires_grad for out in outputs)
    return tiny.by_layer(outputs, "logps_2P")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A checkpoint and the oracle's log-probabilities of the pairs in every row."""
    from transformers import AutoModelForCausalLM

    directory = write_tiny_hf_model(
        tmp_path_factory.mktemp("scored"), "llama", seed=1, pad_token_id=None, **tiny.SIZES
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layers = range(1, tiny.NUM_LAYERS + 1)
    with torch.no_grad():
        return str(directory), oracle.sequence_logps(model, tiny.pairs(), layers)


def full_recompute() -> Any:
    from megatron_idpo.mcore.model.build import ModelOptions, Recompute

    return ModelOptions(recompute=Recompute(granularity="full", method="uniform", num_layers=1))


@pytest.mark.parametrize(
    ("layout", "training", "recompute"),
    [(STAGES, False, False), (INTERLEAVED, True, True), (TENSOR, False, False)],
    ids=["PP2", "VP2-training-recompute", "TP2-SP"],
)
def test_scoring_equals_the_oracle(workers, scored, layout, training, recompute):
    directory, expected = scored
    options = full_recompute() if recompute else None
    answers = workers.run(score, 2, directory, layout, training, options)
    assert set(tiny.merged(answers)) == set(expected)
    for answer in answers:
        for layer, logps in answer.items():
            assert (logps - expected[layer]).abs().max() <= LOGPS_ABSOLUTE, f"layer {layer}"


# ---- the first step ------------------------------------------------------------------------------

OBJECTIVES = [
    Objective(),
    Objective(loss="ipo", beta=0.2),
    Objective(loss="hinge"),
    Objective(loss="robust", label_smoothing=0.2),
    Objective(loss="sigmoid_norm", label_smoothing=0.1),
    Objective(reference_layer="final"),
]


def first_step(layout: Layout) -> dict[str, Any]:
    """Loss and log-ratios of each layer with the model's own log-probabilities as reference."""
    chunks = tiny.start(layout, frozen_head=True)
    dpo = attached(chunks, [1, 2])
    scored = tiny.run(dpo, chunks, tiny.micro_batches(None), forward_only=True)
    local = tiny.by_layer(scored, "logps_2P")
    dpo.detach()
    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, local)
    reference = tiny.merged(by_rank)
    results: dict[str, Any] = {}
    for objective in OBJECTIVES:
        dpo = attached(chunks, [1, 2], objective)
        outputs = tiny.run(dpo, chunks, tiny.micro_batches(reference))
        dpo.detach()
        for chunk in chunks:
            chunk.zero_grad()
        results[repr(objective)] = {
            layer: (loss, policy - reference_logps)
            for (layer, loss), policy, reference_logps in zip(
                tiny.by_layer(outputs, "loss_P").items(),
                tiny.by_layer(outputs, "logps_2P").values(),
                tiny.by_layer(outputs, "reference_logps_2P").values(),
                strict=True,
            )
        }
    return results


def test_first_step_has_the_loss_of_equal_policy_and_reference(workers):
    answers = workers.run(first_step, 2, INTERLEAVED)
    for objective in OBJECTIVES:
        by_layer = tiny.merged([answer[repr(objective)] for answer in answers])
        assert set(by_layer) == {1, 2, 4}
        for layer, (loss_P, ratio_2P) in by_layer.items():
            if objective.reference_layer == "final" and layer != 4:
                assert ratio_2P.abs().min() > 1e-3, "the reference is read at another layer"
                continue
            assert (loss_P - loss_at_zero(objective)).abs().max() <= START_ABSOLUTE
            margins_P = objective.beta * (ratio_2P[0::2] - ratio_2P[1::2])
            assert margins_P.abs().max() <= START_ABSOLUTE
    assert abs(loss_at_zero(OBJECTIVES[0]) - 0.693147) < 1e-6


# ---- eval mode -----------------------------------------------------------------------------------


def train_once(
    layout: Layout,
    layers: Any,
    overrides: dict[str, Any],
    *,
    training: bool = True,
    half: bool = False,
    loss_scale: float = 1.0,
    trained: str = "",
) -> dict[str, Tensor]:
    """One training step; return the gradients of this rank's parameters."""
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if half else torch.float32
    chunks = tiny.start(layout, dtype=dtype, **overrides)
    dpo = attached(chunks, layers)
    config = chunks[0].config
    if loss_scale != 1.0:
        config.grad_scale_func = lambda loss: loss * loss_scale
    inner = [Float16Module(config, chunk) for chunk in chunks] if half else chunks
    models = tiny.wrap(dpo, inner, grad_reduce_in_fp32=half)
    for model in models:
        model.train(training)
    batches = tiny.micro_batches(tiny.references([*layers, tiny.NUM_LAYERS]))
    outputs = tiny.run(dpo, models, batches)
    assert {out.logps_2P.dtype for out in outputs} == {torch.float32}
    assert {out.loss_P.dtype for out in outputs} == {torch.float32}
    return {name: gradient / loss_scale for name, gradient in tiny.gradients(chunks).items()}


def worst(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest |difference| / |gradient| and the parameter's name."""
    assert set(gradients) == set(expected)
    assert all(gradient.any() for gradient in expected.values())
    return max(
        (float((gradients[name] - gradient).norm() / gradient.norm()), name)
        for name, gradient in expected.items()
    )


RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.fixture(scope="module")
def two_stage_gradients(workers):
    """Gradients over two stages with fp32 weights and default settings."""
    return tiny.merged(workers.run(train_once, 2, STAGES, (1, 3), {}))


def test_eval_mode_and_recompute_do_not_change_gradients(workers, two_stage_gradients):
    for training in (True, False):  # megatron-core recomputes in training mode only
        by_rank = workers.run(train_once, 2, STAGES, (1, 3), RECOMPUTE, training=training)
        relative, name = worst(tiny.merged(by_rank), two_stage_gradients)
        assert relative <= GRADIENT_RELATIVE, name


# ---- experts -------------------------------------------------------------------------------------

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_token_dispatcher_type": "alltoall",
    "moe_ffn_hidden_size": 24,
    "moe_grouped_gemm": False,
}


def test_router_keeps_its_auxiliary_loss(workers):
    (expected,) = workers.run(train_once, 1, PLAIN, (1, 2), EXPERTS)
    routers = {name for name in expected if "router" in name}
    assert len(routers) == tiny.NUM_LAYERS
    gradients = tiny.merged(workers.run(train_once, 2, STAGES, (1, 2), EXPERTS))
    relative, name = worst(gradients, expected)
    assert relative <= GRADIENT_RELATIVE, name
    # The auxiliary loss must contribute to the routers' gradients.
    (without,) = workers.run(train_once, 1, PLAIN, (1, 2), EXPERTS | {"moe_aux_loss_coeff": 0.0})
    for name in routers:
        change = (expected[name] - without[name]).norm() / expected[name].norm()
        assert change > 1e-2, f"{name}: the auxiliary loss changes nothing"


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [INTERLEAVED, Layout(pipeline=4)], ids=["VP2", "PP4"])
def test_router_keeps_its_auxiliary_loss_on_other_schedules(workers, layout):
    (expected,) = workers.run(train_once, 1, PLAIN, (1, 2, 3), EXPERTS)
    ranks = layout.model_ranks
    for more in ({}, RECOMPUTE):
        answers = workers.run(train_once, ranks, layout, (1, 2, 3), EXPERTS | more)
        relative, name = worst(tiny.merged(answers), expected)
        assert relative <= GRADIENT_RELATIVE, name


# ---- precision -----------------------------------------------------------------------------------


def test_bf16_on_two_stages_is_close_to_one_rank(workers):
    (expected,) = workers.run(train_once, 1, PLAIN, (1, 2), {}, half=True)
    assert {gradient.dtype for gradient in expected.values()} == {torch.float32}
    gradients = tiny.merged(workers.run(train_once, 2, STAGES, (1, 2), {}, half=True))
    relative, name = worst(gradients, expected)
    assert relative <= BF16_RELATIVE, f"{name}: {relative:.1e}"
    (exact,) = workers.run(train_once, 1, PLAIN, (1, 2), {})
    assert worst(gradients, exact)[0] <= BF16_ERROR_GROWTH * worst(expected, exact)[0]


def test_loss_scale_applies_to_every_layer(workers, two_stage_gradients):
    """Set where megatron-core's fp16 optimizer sets it; a power of two is exact."""
    by_rank = workers.run(train_once, 2, STAGES, (1, 3), {}, loss_scale=2.0**12)
    relative, name = worst(tiny.merged(by_rank), two_stage_gradients)
    assert relative <= GRADIENT_RELATIVE, name
