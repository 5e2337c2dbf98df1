"""What optimizers keep of each parameter, looked at in every kind of optimizer."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.plugin import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

KINDS = {
    "fp32": (1, torch.float32, False),
    "bf16": (1, torch.bfloat16, False),
    "fp32 distributed": (2, torch.float32, True),
    "bf16 distributed": (2, torch.bfloat16, True),
}


def optimized(dtype, distributed, steps=0):
    """A tiny model's parameters by name, and an optimizer that has taken steps."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    (chunk,) = tiny.start(dtype=dtype)
    chunk.embedding.word_embeddings.weight.requires_grad_(False)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    wrapped = DistributedDataParallel(chunk.config, settings, chunk)
    adam = OptimizerConfig(
        lr=0.01, bf16=dtype == torch.bfloat16, use_distributed_optimizer=distributed
    )
    optimizer = get_megatron_optimizer(adam, [wrapped])
    for _ in range(steps):
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.fill_(0.5)
        optimizer.step()
    return dict(chunk.named_parameters()), optimizer


def stretches(kind: str) -> dict[str, tuple[int, int]]:
    """The stretch that this rank holds of each parameter; their main values are the parameter's."""
    from megatron_idpo.mcore.optim.state import sharded_params

    _, dtype, distributed = KINDS[kind]
    parameters, optimizer = optimized(dtype, distributed)
    names = {parameter: name for name, parameter in parameters.items()}
    held = sharded_params(optimizer)
    for one in held:
        assert (one.is_cut, one.has_main_copy) == (distributed, dtype != torch.float32)
        own = one.parameter.detach().view(-1)[one.start : one.stop]
        assert one.main.dtype == torch.float32 and torch.equal(one.main.view(-1), own.float())
        shared = one.main.data_ptr() == own.data_ptr()
        assert shared != one.has_main_copy
    learning = {name for name, parameter in parameters.items() if parameter.requires_grad}
    found = {names[one.parameter]: (one.start, one.stop) for one in held}
    assert len(found) == len(held) and set(found) <= learning
    return found | {"learning": {name: parameters[name].numel() for name in learning}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stretches_are_every_parameter(kind, workers):
    answers = workers.run(stretches, KINDS[kind][0], kind)
    for name, elements in answers[0]["learning"].items():
        held = [answer[name] for answer in answers if name in answer]
        assert held[0][0] == 0 and held[-1][1] == elements
        assert all(one[1] == other[0] for one, other in pairwise(held))


def steps(kind: str) -> list[int | None]:
    """The number of steps before, after three, and as it is set; each parameter counts alone."""
    from megatron_idpo.mcore.optim.state import (
        MOMENTS,
        optimizer_step,
        set_optimizer_step,
        sharded_params,
    )

    _, dtype, distributed = KINDS[kind]
    parameters, optimizer = optimized(dtype, distributed)
    said = [optimizer_step(optimizer)]
    set_optimizer_step(optimizer, 5)
    for held in sharded_params(optimizer):
        assert {name: one.shape for name, one in held.moments().items()} == {
            name: held.main.shape for name in MOMENTS
        }
    said.append(optimizer_step(optimizer))
    for parameter in parameters.values():
        if parameter.requires_grad:
            parameter.main_grad.fill_(0.5)
    optimizer.step()
    said.append(optimizer_step(optimizer))
    set_optimizer_step(optimizer, 0)
    said.append(optimizer_step(optimizer))
    assert all(not held.inner.state.get(held.main) for held in sharded_params(optimizer))
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_counted_once(kind, workers):
    """With one tensor for all parameters, a step would count once for each of them."""
    world_size = KINDS[kind][0]
    assert workers.run(steps, world_size, kind) == [[0, 5, 6, 0]] * world_size


def apart() -> None:
    from megatron_idpo.mcore.optim.state import optimizer_step, sharded_params

    _, optimizer = optimized(torch.float32, False, steps=1)
    held = sharded_params(optimizer)[0]
    held.inner.state[held.main]["step"].add_(1)
    optimizer_step(optimizer)


def test_parameters_that_count_differently(workers):
    with pytest.raises(AssertionError, match=r"have taken \{1, 2\} steps"):
        workers.run(apart, 1)


class CountsInGroups(torch.optim.Optimizer):
    """As apex's and Transformer Engine's Adam do."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def in_groups() -> list[int | None]:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from megatron_idpo.mcore.optim.state import optimizer_step, set_optimizer_step

    inner = CountsInGroups([torch.nn.Parameter(torch.ones(2))])
    optimizer = FP32Optimizer(inner, OptimizerConfig(lr=0.1), None)
    said = [optimizer_step(optimizer)]
    set_optimizer_step(optimizer, 4)
    inner.step()
    return [*said, optimizer_step(optimizer), inner.param_groups[0]["step"]]


def test_an_optimizer_that_counts_in_its_groups(workers):
    assert workers.run(in_groups, 1) == [[0, 5, 5]]


def scaled() -> list[dict[str, float] | None]:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    from megatron_idpo.mcore.optim.state import loss_scaler_state, set_loss_scaler_state

    def fresh() -> SimpleNamespace:
        return SimpleNamespace(grad_scaler=DynamicGradScaler(1024.0, 1.0, 2.0, 0.5, 4, 2))

    one, other, none = fresh(), fresh(), SimpleNamespace(grad_scaler=None)
    one.grad_scaler.update(found_inf=True)
    one.grad_scaler.update(found_inf=True)
    one.grad_scaler.update(found_inf=False)
    state = loss_scaler_state(one)
    set_loss_scaler_state(other, state)
    set_loss_scaler_state(none, state)
    for scaler in (one.grad_scaler, other.grad_scaler):
        for _ in range(3):
            scaler.update(found_inf=False)
    assert float(other.grad_scaler.scale) == float(one.grad_scaler.scale) == 1024.0
    return [state, loss_scaler_state(none)]


def test_the_loss_scale_goes_on(workers):
    (answer,) = workers.run(scaled, 1)
    assert answer == [{"scale": 512.0, "growth_tracker": 1.0, "hysteresis_tracker": 0.0}, None]
