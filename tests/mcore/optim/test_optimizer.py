"""DDP and AdamW match torch's AdamW: clipping, decay, fp32 main copies, sharded state."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from tests.plugin import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

LR, STEPS = 1e-2, 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}
"""fp32, three steps; layouts sum in different orders."""


def gradient(name: str, like: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step + sum(name.encode()))
    return torch.randn(like.shape, generator=generator)


def steps_on_random_gradients(dtype: torch.dtype, lr: float, **settings: Any) -> dict[str, Any]:
    """Weights before and after steps on random gradients, and the gradient norms."""
    from megatron_idpo.config.training import OptimizerConfig
    from megatron_idpo.mcore.model.build import finalize_model_grads
    from megatron_idpo.mcore.optim.optimizer import setup_ddp_and_optimizer

    (chunk,) = tiny.start(dtype=dtype)
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    trainable = setup_ddp_and_optimizer(
        [chunk], OptimizerConfig(lr=1.0, **settings), finalize_model_grads
    )
    assert chunk.config.finalize_model_grads_func is finalize_model_grads
    norms = []
    for step in range(STEPS):
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(9.0)
        trainable.zero_grad_buffers()
        for name, parameter in chunk.named_parameters():
            assert parameter.main_grad.dtype == torch.float32 and not parameter.main_grad.any()
            parameter.main_grad.copy_(gradient(name, parameter, step))
        norms.append(trainable.step(lr / (step + 1)))
    after = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    return {"before": before, "after": after, "norms": norms}


def torch_adamw(
    before: dict[str, Tensor], lr: float, clip: float, decay: float, **settings: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """The same steps with torch, in fp32; norms and biases do not decay."""
    weights = {name: torch.nn.Parameter(p.float().clone()) for name, p in before.items()}
    groups = [
        {"params": [p for p in weights.values() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in weights.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, **settings)
    norms = []
    for step in range(STEPS):
        for name, parameter in weights.items():
            parameter.grad = gradient(name, parameter, step)
        limit = clip or torch.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = lr / (step + 1)
        optimizer.step()
    return {name: p.detach() for name, p in weights.items()}, norms


@pytest.mark.parametrize(
    ("clip", "decay", "betas", "eps"),
    [(1.0, 0.0, (0.9, 0.999), 1e-8), (0.0, 0.1, (0.8, 0.95), 1e-3), (1e9, 0.1, (0.9, 0.999), 1.0)],
)
def test_matches_torchs_adamw_with_clipping_and_decay(workers, clip, decay, betas, eps):
    """Norms are measured before clipping; 0 does not clip."""
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps}
    (ours,) = workers.run(
        steps_on_random_gradients,
        1,
        torch.float32,
        LR,
        clip_grad=clip,
        weight_decay=decay,
        **settings,
    )
    expected, norms = torch_adamw(ours["before"], LR, clip, decay, betas=betas, eps=eps)
    assert ours["norms"] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1, "the gradient must need clipping"
    for name, weight in expected.items():
        torch.testing.assert_close(ours["after"][name], weight, **TOLERANCE)
        assert not torch.equal(weight, ours["before"][name])


def test_bf16_weights_accumulate_updates_in_fp32(workers):
    """Each single update is below bf16 resolution."""
    lr = 2.0**-11
    (ours,) = workers.run(steps_on_random_gradients, 1, torch.bfloat16, lr)
    expected, _ = torch_adamw(ours["before"], lr, 1.0, 0.0)
    name = "decoder.final_layernorm.weight"  # around 1, where bf16 has a spacing of 2^-7 or 2^-8
    assert (expected[name] - ours["before"][name].float()).abs().max() > 2.0**-11
    for name, weight in expected.items():
        assert ours["after"][name].dtype == torch.bfloat16
        difference = (ours["after"][name].float() - weight).abs()
        assert (difference <= weight.abs() * 2.0**-8 + 1e-6).all(), name


def trained(layout: Layout, distributed: bool) -> dict[str, Any]:
    """Weights after real training steps, gradient norms, and sizes of the optimizer state."""
    from megatron_idpo.config.training import OptimizerConfig
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.mcore.optim.optimizer import setup_ddp_and_optimizer
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    chunks = tiny.start(layout)
    dpo = attach(
        chunks,
        layers=[1, 3],
        objective=Objective(beta=0.5, intermediate_weight=0.4),
        vocab_size=tiny.VOCAB,
    )
    settings = OptimizerConfig(lr=LR, eps=1e-4, clip_grad=0.1, distributed=distributed)
    trainable = setup_ddp_and_optimizer(chunks, settings, dpo.finalize_model_grads)
    rows = tiny.micro_batches(tiny.references((1, 3, tiny.NUM_LAYERS)))
    norms = []
    for _ in range(STEPS):
        trainable.zero_grad_buffers()
        tiny.run(dpo, trainable.model, rows)
        norms.append(trainable.step(LR))
    pending = {name: p.detach().clone() for name, p in global_parameters(chunks)}
    trainable.gather_weights()
    state = sum(
        moments["exp_avg"].numel()
        for optimizer in trainable.optimizer.chained_optimizers
        for moments in optimizer.optimizer.state.values()
    )
    weights = {name: p.detach().clone() for name, p in global_parameters(chunks)}
    gathered = sum(not torch.equal(weight, pending[name]) for name, weight in weights.items())
    return {"weights": weights, "norms": norms, "state": state, "gathered": gathered}


@pytest.mark.parametrize(
    ("layout", "processes", "distributed"),
    [
        (Layout(), 2, True),
        (Layout(), 2, False),
        (Layout(pipeline=2), 2, True),
        pytest.param(Layout(pipeline=2), 4, True, marks=pytest.mark.exhaustive),
        pytest.param(Layout(pipeline=2, virtual_pipeline=2), 4, True, marks=pytest.mark.exhaustive),
    ],
)
def test_every_layout_takes_the_same_steps_and_shards_the_state(
    workers, layout, processes, distributed
):
    (single,) = workers.run(trained, 1, Layout(), True)
    ranks = workers.run(trained, processes, layout, distributed)
    assert single["norms"][0] > 0.1, "the gradient must need clipping"
    for rank in ranks:
        assert rank["norms"] == pytest.approx(single["norms"], rel=1e-5)
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, single["weights"][name], **TOLERANCE, msg=name)
    assert {name for rank in ranks for name in rank["weights"]} == single["weights"].keys()
    if layout == Layout():
        states = [rank["state"] for rank in ranks]
        assert sum(states) == single["state"] * (1 if distributed else processes)
        assert max(states) < single["state"] or not distributed
    # Without pipeline stages the next forward pass would have gathered the others' part.
    overlaps = distributed and layout == Layout()
    assert all((rank["gathered"] > 0) == overlaps for rank in ranks)


def norms_of_bad_gradients() -> list[float]:
    from megatron_idpo.config.training import OptimizerConfig
    from megatron_idpo.mcore.model.build import finalize_model_grads
    from megatron_idpo.mcore.optim.optimizer import setup_ddp_and_optimizer

    norms = []
    (chunk,) = tiny.start()
    trainable = setup_ddp_and_optimizer([chunk], OptimizerConfig(lr=LR), finalize_model_grads)
    for value in (float("nan"), float("inf")):
        trainable.zero_grad_buffers()
        next(chunk.parameters()).main_grad[0] = value
        norms.append(trainable.step(LR))
    return norms


def test_a_nan_or_inf_gradient_shows_in_the_norm(workers):
    (norms,) = workers.run(norms_of_bad_gradients, 1)
    assert not any(math.isfinite(norm) for norm in norms)
