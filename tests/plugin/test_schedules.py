"""On megatron-core's schedules, beside the oracle's training: scoring, the start, experts, bf16.

Layouts are compared with one rank; scoring with `tests/oracle.py`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.mcore.parallel.layout import Layout
from megatron_idpo.objective.dpo import Objective, loss_at_zero
from megatron_idpo.testing import write_tiny_hf_model

from . import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

LOGPS_ABSOLUTE = 2e-5
"""fp32 sums over at most 4 tokens' log-softmax, layers in another order of summation."""

START_ABSOLUTE = 1e-6
"""Policy and reference are the same numbers, so nothing may remain but rounding."""

GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient| of each tensor: fp32 in another order."""

BF16_RELATIVE = 2e-2
"""bf16 keeps 8 bits, so a sum is off by 2^-9; where a stage ends, the gradients of a tap and of the
layers above meet in another order, and a few roundings differ. Measured: 8.1e-3, for the embedding.
"""

BF16_ERROR_GROWTH = 1.5
"""How much further from fp32 two stages may be than one, whose own error (2.1e-2) is rounding."""

PLAIN = Layout()
STAGES = Layout(pipeline=2)
INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)
TENSOR = Layout(tensor=2, sequence_parallel=True)


def load_oracle() -> Any:
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parents[1] / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attached(chunks: Any, layers: Any, objective: Objective | None = None) -> Any:
    from megatron_idpo.plugin.attach import attach

    objective = objective or Objective(beta=0.3, intermediate_weight=0.4)
    return attach(chunks, layers=layers, objective=objective, vocab_size=tiny.VOCAB)


# ---- scoring -------------------------------------------------------------------------------------


def score(directory: str, layout: Layout, training: bool, options: Any) -> dict[int, Tensor]:
    """Log-probabilities of all local layers, without references, forward only."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.mcore.model.build import build_model

    checkpoint, architecture = open_hf(Path(directory))
    layout.start()
    chunks = build_model(architecture, layout, options)
    load_hf_weights(chunks, checkpoint, architecture)
    for chunk in chunks:
        chunk.train(training)
    dpo = attached(chunks, "all")
    # A script that scores need not say what a loss would be averaged over.
    batches = tiny.micro_batches(None, num_micro_batches=0, global_pairs=0)
    tiny.run(dpo, chunks, batches, forward_only=True)
    outputs = dpo.take_outputs(len(batches))
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
        return str(directory), load_oracle().sequence_logps(model, tiny.pairs(), layers)


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
    assert set(tiny.together(answers)) == set(expected)
    for answer in answers:
        for layer, logps in answer.items():
            assert (logps - expected[layer]).abs().max() <= LOGPS_ABSOLUTE, f"layer {layer}"


# ---- the start -----------------------------------------------------------------------------------

OBJECTIVES = [
    Objective(),
    Objective(loss="ipo", beta=0.2),
    Objective(loss="hinge"),
    Objective(loss="robust", label_smoothing=0.2),
    Objective(loss="sigmoid_norm", label_smoothing=0.1),
    Objective(reference_layer="final"),
]


def start(layout: Layout) -> dict[str, Any]:
    """Every layer's loss and log-ratios in the first step, against the model's own readings."""
    chunks = tiny.start(layout, frozen_head=True)
    dpo = attached(chunks, [1, 2])
    tiny.run(dpo, chunks, tiny.micro_batches(None), forward_only=True)
    mine = tiny.by_layer(dpo.take_outputs(4), "logps_2P")
    dpo.detach()
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    reference = tiny.together(parts)
    message: dict[str, Any] = {}
    for objective in OBJECTIVES:
        dpo = attached(chunks, [1, 2], objective)
        tiny.run(dpo, chunks, tiny.micro_batches(reference))
        outputs = dpo.take_outputs(4)
        dpo.detach()
        for chunk in chunks:
            chunk.zero_grad()
        message[repr(objective)] = {
            layer: (loss, policy - against)
            for (layer, loss), policy, against in zip(
                tiny.by_layer(outputs, "loss_P").items(),
                tiny.by_layer(outputs, "logps_2P").values(),
                tiny.by_layer(outputs, "reference_logps_2P").values(),
                strict=True,
            )
        }
    return message


def test_at_the_start_every_layers_loss_is_that_of_no_difference(workers):
    answers = workers.run(start, 2, INTERLEAVED)
    for objective in OBJECTIVES:
        found = tiny.together([answer[repr(objective)] for answer in answers])
        assert set(found) == {1, 2, 4}
        for layer, (loss_P, ratio_2P) in found.items():
            if objective.reference_layer == "final" and layer != 4:
                assert ratio_2P.abs().min() > 1e-3, "another layer's reading is no start"
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
    """The gradients of one step, of this rank's parameters."""
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
    tiny.run(dpo, models, tiny.micro_batches(tiny.references([*layers, tiny.NUM_LAYERS])))
    outputs = dpo.take_outputs(4)
    assert {out.logps_2P.dtype for out in outputs} == {torch.float32}
    assert {out.loss_P.dtype for out in outputs} == {torch.float32}
    return {name: gradient / loss_scale for name, gradient in tiny.gradients(chunks).items()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest |difference| / |gradient| and whose it is."""
    assert set(found) == set(expected)
    assert all(gradient.any() for gradient in expected.values())
    return max(
        (float((found[name] - gradient).norm() / gradient.norm()), name)
        for name, gradient in expected.items()
    )


def test_training_in_eval_mode_is_the_same_without_recomputation(workers):
    overrides = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    expected = tiny.together(workers.run(train_once, 2, STAGES, (1, 3), overrides))
    found = workers.run(train_once, 2, STAGES, (1, 3), overrides, training=False)
    relative, name = worst(tiny.together(found), expected)
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


def test_experts_keep_their_own_loss_beside_ours(workers):
    (expected,) = workers.run(train_once, 1, PLAIN, (1, 2), EXPERTS)
    routers = {name for name in expected if "router" in name}
    assert len(routers) == tiny.NUM_LAYERS
    found = tiny.together(workers.run(train_once, 2, STAGES, (1, 2), EXPERTS))
    relative, name = worst(found, expected)
    assert relative <= GRADIENT_RELATIVE, name
    # The auxiliary loss is there, and it is not ours that moves the routers alone.
    (without,) = workers.run(train_once, 1, PLAIN, (1, 2), EXPERTS | {"moe_aux_loss_coeff": 0.0})
    for name in routers:
        change = (expected[name] - without[name]).norm() / expected[name].norm()
        assert change > 1e-2, f"{name}: the auxiliary loss changes nothing"


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [INTERLEAVED, Layout(pipeline=4)], ids=["VP2", "PP4"])
def test_experts_on_other_schedules(workers, layout):
    (expected,) = workers.run(train_once, 1, PLAIN, (1, 2, 3), EXPERTS)
    ranks = layout.model_ranks
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    for more in ({}, recompute):
        answers = workers.run(train_once, ranks, layout, (1, 2, 3), EXPERTS | more)
        relative, name = worst(tiny.together(answers), expected)
        assert relative <= GRADIENT_RELATIVE, name


# ---- 16 bits -------------------------------------------------------------------------------------


def test_bf16_over_stages_is_close_to_one_rank(workers):
    (expected,) = workers.run(train_once, 1, PLAIN, (1, 2), {}, half=True)
    assert {gradient.dtype for gradient in expected.values()} == {torch.float32}
    found = tiny.together(workers.run(train_once, 2, STAGES, (1, 2), {}, half=True))
    relative, name = worst(found, expected)
    assert relative <= BF16_RELATIVE, f"{name}: {relative:.1e}"
    (exact,) = workers.run(train_once, 1, PLAIN, (1, 2), {})
    assert worst(found, exact)[0] <= BF16_ERROR_GROWTH * worst(expected, exact)[0]


def test_a_loss_scale_scales_every_layers_gradient(workers):
    """megatron-core's own place for it, as its fp16 optimizer sets it; a power of two is exact."""
    expected = tiny.together(workers.run(train_once, 2, STAGES, (1, 3), {}))
    found = tiny.together(workers.run(train_once, 2, STAGES, (1, 3), {}, loss_scale=2.0**12))
    relative, name = worst(found, expected)
    assert relative <= GRADIENT_RELATIVE, name
