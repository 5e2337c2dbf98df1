"""DDP and AdamW by megatron-core are torch's AdamW: clipping, decay, fp32 copies, split states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from tests.plugin import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

LR, STEPS = 1e-2, 3
DIGITS = {"rtol": 1e-5, "atol": 1e-7}
"""fp32, three steps; between layouts sums are taken in another order."""


def gradient(name: str, like: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step + sum(name.encode()))
    return torch.randn(like.shape, generator=generator)


def given_gradients(dtype: torch.dtype, lr: float, **settings: Any) -> dict[str, Any]:
    """Weights before and after steps with made-up gradients, and the norms."""
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


def by_torch(
    before: dict[str, Tensor], lr: float, clip: float, decay: float, **settings: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """The same steps by torch, in fp32; norms and biases do not decay."""
    weights = {name: torch.nn.Parameter(one.float().clone()) for name, one in before.items()}
    groups = [
        {"params": [p for p in weights.values() if (p.dim() > 1) == decays], "weight_decay": amount}
        for decays, amount in ((True, decay), (False, 0.0))
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
def test_it_is_torchs_adamw(workers, clip, decay, betas, eps):
    """Norms are those before clipping; 0 does not clip."""
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps}
    (ours,) = workers.run(
        given_gradients, 1, torch.float32, LR, clip_grad=clip, weight_decay=decay, **settings
    )
    theirs, norms = by_torch(ours["before"], LR, clip, decay, betas=betas, eps=eps)
    assert ours["norms"] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1, "the norm is to be clipped to 1"
    for name, weight in theirs.items():
        torch.testing.assert_close(ours["after"][name], weight, **DIGITS)
        assert not torch.equal(weight, ours["before"][name])


def test_weights_of_16_bits_add_up_in_fp32(workers):
    """Each step alone is too small to move them."""
    lr = 2.0**-11
    (ours,) = workers.run(given_gradients, 1, torch.bfloat16, lr)
    theirs, _ = by_torch(ours["before"], lr, 1.0, 0.0)
    name = "decoder.final_layernorm.weight"  # around 1, where bf16 has steps of 2^-7 and 2^-8
    assert (theirs[name] - ours["before"][name].float()).abs().max() > 2.0**-11
    for name, weight in theirs.items():
        assert ours["after"][name].dtype == torch.bfloat16
        difference = (ours["after"][name].float() - weight).abs()
        assert (difference <= weight.abs() * 2.0**-8 + 1e-6).all(), name


def trained(layout: Layout, distributed: bool) -> dict[str, Any]:
    """Weights after real steps, by name, and every step's norm."""
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
        dpo.take_outputs(len(rows))
        norms.append(trainable.step(LR))
    held = sum(len(group["params"]) for group in trainable.optimizer.param_groups)
    state = sum(
        moments["exp_avg"].numel()
        for one in trainable.optimizer.chained_optimizers
        for moments in one.optimizer.state.values()
    )
    weights = {name: p.detach().clone() for name, p in global_parameters(chunks)}
    return {"weights": weights, "norms": norms, "held": held, "state": state}


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
def test_every_layout_takes_the_same_steps(workers, layout, processes, distributed):
    (one,) = workers.run(trained, 1, Layout(), True)
    ranks = workers.run(trained, processes, layout, distributed)
    assert one["norms"][0] > 0.1, "it is to be clipped"
    for rank in ranks:
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], **DIGITS, msg=name)
    assert {name for rank in ranks for name in rank["weights"]} == one["weights"].keys()
    if layout == Layout():
        states = [rank["state"] for rank in ranks]
        assert sum(states) == one["state"] * (1 if distributed else processes)
        assert max(states) < one["state"] or not distributed


def spoilt() -> list[float]:
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


def test_a_gradient_that_is_no_number_is_in_the_norm(workers):
    (norms,) = workers.run(spoilt, 1)
    assert not any(map(torch.isfinite, map(torch.tensor, norms)))
