"""`ShardedParam`s, step counts and loss scales of every kind of megatron-core optimizer."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

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
    """A tiny model's parameters by name, and its optimizer after some steps."""
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


def shard_bounds(kind: str) -> dict[str, Any]:
    """This rank's element range of each parameter, and the sizes of all trainable parameters.

    Checks that the main values equal the parameter's elements.
    """
    from megatron_idpo.mcore.optim.state import sharded_params

    _, dtype, distributed = KINDS[kind]
    parameters, optimizer = optimized(dtype, distributed)
    names = {parameter: name for name, parameter in parameters.items()}
    shards = sharded_params(optimizer)
    for shard in shards:
        assert (shard.is_cut, shard.has_main_copy) == (distributed, dtype != torch.float32)
        elements = shard.parameter.detach().view(-1)[shard.start : shard.stop]
        assert shard.main.dtype == torch.float32
        assert torch.equal(shard.main.view(-1), elements.float())
        assert (shard.main.data_ptr() == elements.data_ptr()) != shard.has_main_copy
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    bounds = {names[shard.parameter]: (shard.start, shard.stop) for shard in shards}
    assert len(bounds) == len(shards) and set(bounds) <= trainable
    return {"bounds": bounds, "sizes": {name: parameters[name].numel() for name in trainable}}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_cover_every_parameter(kind, workers):
    ranks = workers.run(shard_bounds, KINDS[kind][0], kind)
    for name, size in ranks[0]["sizes"].items():
        bounds = [rank["bounds"][name] for rank in ranks if name in rank["bounds"]]
        assert bounds[0][0] == 0 and bounds[-1][1] == size
        assert all(before[1] == after[0] for before, after in pairwise(bounds))


def step_counts(kind: str) -> list[int | None]:
    """The step count of a new optimizer, after setting 5, after one more step, after setting 0."""
    from megatron_idpo.mcore.optim.state import (
        MOMENTS,
        optimizer_step,
        set_optimizer_step,
        sharded_params,
    )

    _, dtype, distributed = KINDS[kind]
    parameters, optimizer = optimized(dtype, distributed)
    counts = [optimizer_step(optimizer)]
    set_optimizer_step(optimizer, 5)
    for shard in sharded_params(optimizer):
        assert {name: moment.shape for name, moment in shard.moments().items()} == {
            name: shard.main.shape for name in MOMENTS
        }
    counts.append(optimizer_step(optimizer))
    for parameter in parameters.values():
        if parameter.requires_grad:
            parameter.main_grad.fill_(0.5)
    optimizer.step()
    counts.append(optimizer_step(optimizer))
    set_optimizer_step(optimizer, 0)
    counts.append(optimizer_step(optimizer))
    assert all(not shard.inner.state.get(shard.main) for shard in sharded_params(optimizer))
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_counts_once_after_the_count_was_set(kind, workers):
    """With a `step` tensor shared by all parameters, it would count once for each of them."""
    world_size = KINDS[kind][0]
    assert workers.run(step_counts, world_size, kind) == [[0, 5, 6, 0]] * world_size


def different_step_counts() -> None:
    from megatron_idpo.mcore.optim.state import optimizer_step, sharded_params

    _, optimizer = optimized(torch.float32, False, steps=1)
    shard = sharded_params(optimizer)[0]
    shard.inner.state[shard.main]["step"].add_(1)
    optimizer_step(optimizer)


def test_different_step_counts_of_parameters_are_an_error(workers):
    with pytest.raises(AssertionError, match=r"have taken \{1, 2\} steps"):
        workers.run(different_step_counts, 1)


class GroupStepOptimizer(torch.optim.Optimizer):
    """Keeps its step count in the parameter groups, like apex's and Transformer Engine's Adam."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def step_counts_in_groups() -> list[int | None]:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from megatron_idpo.mcore.optim.state import optimizer_step, set_optimizer_step

    inner = GroupStepOptimizer([torch.nn.Parameter(torch.ones(2))])
    optimizer = FP32Optimizer(inner, OptimizerConfig(lr=0.1), None)
    counts = [optimizer_step(optimizer)]
    set_optimizer_step(optimizer, 4)
    inner.step()
    return [*counts, optimizer_step(optimizer), inner.param_groups[0]["step"]]


def test_step_counts_in_parameter_groups(workers):
    assert workers.run(step_counts_in_groups, 1) == [[0, 5, 5]]


def restore_loss_scale() -> list[dict[str, float] | None]:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    from megatron_idpo.mcore.optim.state import loss_scaler_state, set_loss_scaler_state

    def fresh() -> SimpleNamespace:
        return SimpleNamespace(grad_scaler=DynamicGradScaler(1024.0, 1.0, 2.0, 0.5, 4, 2))

    saved, restored, none = fresh(), fresh(), SimpleNamespace(grad_scaler=None)
    saved.grad_scaler.update(found_inf=True)
    saved.grad_scaler.update(found_inf=True)
    saved.grad_scaler.update(found_inf=False)
    state = loss_scaler_state(saved)
    set_loss_scaler_state(restored, state)
    set_loss_scaler_state(none, state)
    for scaler in (saved.grad_scaler, restored.grad_scaler):
        for _ in range(3):
            scaler.update(found_inf=False)
    assert float(restored.grad_scaler.scale) == float(saved.grad_scaler.scale) == 1024.0
    return [state, loss_scaler_state(none)]


def test_loss_scaler_state_is_restored(workers):
    (states,) = workers.run(restore_loss_scale, 1)
    assert states == [{"scale": 512.0, "growth_tracker": 1.0, "hysteresis_tracker": 0.0}, None]
