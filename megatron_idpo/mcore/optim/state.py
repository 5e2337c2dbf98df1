"""What megatron-core's optimizers keep of each parameter, seen alike in all of them.

`sharded_params` looks through chains and says of every parameter that learns which stretch of it
this rank's optimizer holds, where its fp32 main values lie and where Adam's moments do. The plain
optimizers hold whole parameters; a `DistributedOptimizer` holds stretches that pay no heed to rows.
So a checkpoint can be written and read in the parameters' own terms, whatever the layout.

megatron-core 0.19's own way (`sharded_state_dict`) fails with torch's AdamW: it asserts on an
optimizer that has not stepped yet, raises `KeyError: 'step'` on loading, and leaves all parameters
with one `step` tensor, so that every step counts once per parameter. Here `step` is one number for
the whole optimizer, as all of its parameters step together, and each parameter gets a tensor of it.
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
"""Adam's, by the names of torch, apex and Transformer Engine."""


@dataclass(frozen=True, eq=False)
class ShardedParam:
    """A stretch of one parameter that this rank's optimizer updates."""

    parameter: torch.nn.Parameter

    start: int
    """The first element, counting the parameter's elements in their order in memory."""

    stop: int
    """One behind the last."""

    main: Tensor
    """fp32, `stop - start` elements: a copy if the parameter has 16 bits, else its own memory."""

    inner: torch.optim.Optimizer
    """The optimizer that keeps the moments, under `main`."""

    is_cut: bool
    """Whether the data-parallel ranks hold different stretches, rather than all the whole."""

    @property
    def has_main_copy(self) -> bool:
        """Whether `main` is memory of its own."""
        return self.parameter.dtype != torch.float32

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments by name, flat as `main` is; allocated where there are none yet."""
        state = self.inner.state[self.main]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(self.main, memory_format=torch.preserve_format)
        return {name: state[name] for name in MOMENTS}

    def forget(self) -> None:
        """Back to what it was before the first step."""
        self.inner.state.pop(self.main, None)


def sharded_params(optimizer: MegatronOptimizer) -> list[ShardedParam]:
    """Every stretch that this rank's optimizer updates, in a fixed order."""
    return [held for leaf in _leaves(optimizer) for held in _held_by(leaf)]


def optimizer_step(optimizer: MegatronOptimizer) -> int | None:
    """How many steps the optimizer has taken; None where this rank updates nothing."""
    steps = set()
    for held in sharded_params(optimizer):
        step = held.inner.state.get(held.main, {}).get("step")
        if step is None:
            # apex and Transformer Engine count in the group; before the first step nobody does.
            step = next((g["step"] for g in held.inner.param_groups if "step" in g), 0)
        steps.add(int(step))
    assert len(steps) <= 1, f"an optimizer's parameters have taken {steps} steps"
    return steps.pop() if steps else None


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Make the optimizer one that has taken so many steps; with 0 it has no moments either."""
    for held in sharded_params(optimizer):
        if step == 0:
            held.forget()
            continue
        group = _group_of(held)
        if isinstance(held.inner, torch.optim.Adam):  # AdamW is one
            on_device = group.get("capturable") or group.get("fused")
            held.inner.state[held.main]["step"] = torch.tensor(
                float(step),
                dtype=torch.float32,
                device=held.main.device if on_device else torch.device("cpu"),
            )
        else:
            group["step"] = step


def loss_scaler_state(optimizer: MegatronOptimizer) -> dict[str, float] | None:
    """The loss scaler's numbers, where there is one (fp16)."""
    for leaf in _leaves(optimizer):
        if getattr(leaf, "grad_scaler", None) is not None:
            return {name: float(value) for name, value in leaf.grad_scaler.state_dict().items()}
    return None


def set_loss_scaler_state(optimizer: MegatronOptimizer, state: dict[str, float]) -> None:
    """Take over what `loss_scaler_state` gave."""
    for leaf in _leaves(optimizer):
        if getattr(leaf, "grad_scaler", None) is not None:
            counters = {name: int(number) for name, number in state.items() if name != "scale"}
            scale = torch.tensor([state["scale"]], dtype=torch.float32)
            leaf.grad_scaler.load_state_dict({**counters, "scale": scale})


def _leaves(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers in a chain that have something to update here."""
    if isinstance(optimizer, ChainedOptimizer):
        for link in optimizer.chained_optimizers:
            yield from _leaves(link)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def _held_by(leaf: Any) -> Iterator[ShardedParam]:
    config = leaf.config
    assert not config.use_precision_aware_optimizer, "the main parameters are not at hand"
    if isinstance(leaf, DistributedOptimizer):
        assert leaf.ddp_config.num_distributed_optimizer_instances == 1
        for parameter, (group, location) in leaf.model_param_group_index_map.items():
            main = leaf.optimizer.param_groups[group]["params"][location]
            own = leaf._get_model_param_range_map(parameter)["param"]
            yield ShardedParam(parameter, own.start, own.end, main, leaf.optimizer, is_cut=True)
    elif isinstance(leaf, Float16OptimizerWithFloat16Params):
        copies = zip(_flat(leaf.float16_groups), _flat(leaf.fp32_from_float16_groups), strict=True)
        own = ((parameter, parameter) for parameter in _flat(leaf.fp32_from_fp32_groups))
        for parameter, main in (*copies, *own):
            yield ShardedParam(parameter, 0, parameter.numel(), main, leaf.optimizer, is_cut=False)
    else:
        assert isinstance(leaf, FP32Optimizer), f"no checkpoints of {type(leaf).__name__}"
        for parameter in leaf.get_parameters():
            yield ShardedParam(
                parameter, 0, parameter.numel(), parameter, leaf.optimizer, is_cut=False
            )


def _flat(groups: Iterable[Iterable[Any]]) -> Iterator[Any]:
    return (one for group in groups for one in group)


def _group_of(held: ShardedParam) -> dict[str, Any]:
    for group in held.inner.param_groups:
        if any(one is held.main for one in group["params"]):
            return group
    raise AssertionError("a main parameter is in no group of its optimizer")
