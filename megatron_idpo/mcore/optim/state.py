"""The state that megatron-core's optimizers keep per parameter, in one form for all of them.

`sharded_params` walks through chained optimizers and returns, for each trained parameter, which
elements this rank's optimizer updates, their fp32 main values and Adam's moments. The plain
optimizers update whole parameters. `DistributedOptimizer` concatenates the parameters of a DDP
buffer and cuts the buffer into equal parts over the data-parallel ranks, so a shard is a range of
flat elements that may start and end inside a row. Checkpoints are written and read in terms of the
whole parameter, independent of the layout.

megatron-core 0.19's `sharded_state_dict` fails with torch's AdamW: it asserts on an optimizer that
has not stepped yet, raises `KeyError: 'step'` on loading, and then shares one `step` tensor between
all parameters, so that each step counts once per parameter. Here `step` is one integer for the
whole optimizer, as all of its parameters step together, and each parameter gets its own tensor.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, as torch, apex and Transformer Engine name them."""


@dataclass(frozen=True, eq=False)
class ShardedParam:
    """The part of one parameter that this rank's optimizer updates."""

    parameter: torch.nn.Parameter

    start: int
    """First element, as an index into the flattened parameter."""

    stop: int
    """One past the last element."""

    main: Tensor
    """fp32, `stop - start` elements: a copy for a 16-bit parameter, else a view of it."""

    inner: torch.optim.Optimizer
    """The torch-style optimizer that keeps the moments, keyed by `main`."""

    is_cut: bool
    """True if the data-parallel ranks hold different parts, False if each holds all of it."""

    @property
    def has_main_copy(self) -> bool:
        """Whether `main` is separate memory from the parameter."""
        return self.parameter.dtype != torch.float32

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments by name, flat like `main`; allocated as zeros before the first step."""
        state = self.inner.state[self.main]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(self.main, memory_format=torch.preserve_format)
        return {name: state[name] for name in MOMENTS}

    def param_group(self) -> dict[str, Any]:
        """The parameter group of `inner` that contains `main`."""
        for group in self.inner.param_groups:
            # By identity: `in` would compare tensors elementwise.
            if any(main is self.main for main in group["params"]):
                return group
        raise AssertionError("a main parameter is in no group of its optimizer")


def sharded_params(optimizer: MegatronOptimizer) -> list[ShardedParam]:
    """Everything that this rank's optimizer updates, in a fixed order."""
    return [shard for leaf in _leaves(optimizer) for shard in _leaf_shards(leaf)]


def optimizer_step(optimizer: MegatronOptimizer) -> int | None:
    """Number of steps the optimizer has taken; None if this rank updates nothing."""
    steps = set()
    for shard in sharded_params(optimizer):
        step = shard.inner.state.get(shard.main, {}).get("step")
        if step is None:
            # apex and Transformer Engine keep the count in the group; before the first step there
            # is none.
            step = next((g["step"] for g in shard.inner.param_groups if "step" in g), 0)
        steps.add(int(step))
    assert len(steps) <= 1, f"an optimizer's parameters have taken {steps} steps"
    return steps.pop() if steps else None


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the number of steps taken; 0 also deletes the moments."""
    for shard in sharded_params(optimizer):
        if step == 0:
            shard.inner.state.pop(shard.main, None)
            continue
        group = shard.param_group()
        if isinstance(shard.inner, torch.optim.Adam):  # includes AdamW
            # A tensor per parameter: AdamW increments it in place, a shared one would be
            # incremented once per parameter. It stays on the CPU unless a fused kernel reads it.
            on_device = group.get("capturable") or group.get("fused")
            shard.inner.state[shard.main]["step"] = torch.tensor(
                float(step),
                dtype=torch.float32,
                device=shard.main.device if on_device else torch.device("cpu"),
            )
        else:
            group["step"] = step


def loss_scaler_state(optimizer: MegatronOptimizer) -> dict[str, float] | None:
    """The loss scaler's state; None without one (only fp16 has it)."""
    for leaf in _leaves(optimizer):
        if getattr(leaf, "grad_scaler", None) is not None:
            return {name: float(value) for name, value in leaf.grad_scaler.state_dict().items()}
    return None


def set_loss_scaler_state(optimizer: MegatronOptimizer, state: dict[str, float]) -> None:
    """Restore what `loss_scaler_state` returned, in every optimizer of a chain."""
    for leaf in _leaves(optimizer):
        if getattr(leaf, "grad_scaler", None) is not None:
            counters = {name: int(value) for name, value in state.items() if name != "scale"}
            scale = torch.tensor([state["scale"]], dtype=torch.float32)
            leaf.grad_scaler.load_state_dict({**counters, "scale": scale})


def _leaves(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers in a chain that update something on this rank."""
    if isinstance(optimizer, ChainedOptimizer):
        for link in optimizer.chained_optimizers:
            yield from _leaves(link)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def _leaf_shards(leaf: Any) -> Iterator[ShardedParam]:
    assert not leaf.config.use_precision_aware_optimizer, "the main parameters are not accessible"
    if isinstance(leaf, DistributedOptimizer):
        assert leaf.ddp_config.num_distributed_optimizer_instances == 1
        for parameter, (group, index) in leaf.model_param_group_index_map.items():
            main = leaf.optimizer.param_groups[group]["params"][index]
            # "param": relative to the flattened parameter; the other ranges are relative to the
            # DDP buffer.
            elements = leaf._get_model_param_range_map(parameter)["param"]
            yield ShardedParam(
                parameter, elements.start, elements.end, main, leaf.optimizer, is_cut=True
            )
        return
    if isinstance(leaf, Float16OptimizerWithFloat16Params):
        params = [*_flat(leaf.float16_groups), *_flat(leaf.fp32_from_fp32_groups)]
        # fp32 parameters in a 16-bit model (a router, for example) are their own main values.
        mains = [*_flat(leaf.fp32_from_float16_groups), *_flat(leaf.fp32_from_fp32_groups)]
    else:
        assert isinstance(leaf, FP32Optimizer), f"no checkpoints of {type(leaf).__name__}"
        params = mains = leaf.get_parameters()
    for parameter, main in zip(params, mains, strict=True):
        yield ShardedParam(parameter, 0, parameter.numel(), main, leaf.optimizer, is_cut=False)


def _flat(groups: Iterable[Iterable[Any]]) -> Iterator[Any]:
    return (parameter for group in groups for parameter in group)
