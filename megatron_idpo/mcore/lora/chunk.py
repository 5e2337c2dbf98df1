"""All adapters of one model chunk, as its submodule `lora`.

As a submodule, the adapters reach DDP, the optimizer and distributed checkpoints like any other
parameter. The chunk's own modules keep their names, parameters and checkpoint keys. The `forward`
of its linears is replaced on the instance and restored by `remove_adapters`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.lora.base_linear import (
    ParallelLinear,
    forward_with_input,
    frozen_forward,
    is_adaptable,
    rounds_once,
)
from megatron_idpo.mcore.lora.experts import EXPERT_LINEARS, ExpertAdapters
from megatron_idpo.mcore.lora.linear import FusedRows, LinearAdapters, LoraHyperparams
from megatron_idpo.mcore.lora.products import LowRank, add_low_rank
from megatron_idpo.mcore.model.chunk import RestoreFn
from megatron_idpo.mcore.model.grouped_experts import GroupedExperts
from megatron_idpo.mcore.parallel.groups import rank_coordinates

ADAPTERS_NAME = "lora"
"""The submodule's name in a chunk, and the prefix of its parameters' names and checkpoint keys."""

FUSED = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""The linears of a megatron-core layer, and the projections fused in each."""

EXPERTS_NAME = "experts"
"""The adapters of a layer's experts among those of its linears, and the prefix of their targets."""

EXPERT_TARGETS = tuple(f"{EXPERTS_NAME}.{name}" for name in EXPERT_LINEARS.values())
"""Targets in a layer's experts; each adapts the weights of all of them."""


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """A or B of one projection, or of one target in all experts of a layer, on this rank."""

    layer: int
    """From 0, over the whole model."""

    projection: str
    side: str
    """`A` or `B`."""

    parameter: torch.nn.Parameter
    split_dim: int | None
    """The dimension sharded over tensor-parallel ranks; None if the tensor is replicated."""

    first_expert: int | None = None
    """Of experts, which are dimension 0: the first one's index in the whole model."""

    @property
    def is_expert(self) -> bool:
        """Whether the tensor is of experts: its shards and copies are on other ranks."""
        return self.first_expert is not None

    @property
    def name(self) -> str:
        """Global name, independent of the layout."""
        return f"{ADAPTERS_NAME}.layers.{self.layer}.{self.projection}.{self.side}"


class ChunkAdapters(torch.nn.Module):
    """The adapters of a chunk's layers; `layers[local index][linear]` are `LinearAdapters`."""

    def __init__(
        self, chunk: GPTModel, targets: Sequence[str], hyperparams: LoraHyperparams
    ) -> None:
        """Allocate them: A uninitialised, B zero.

        Args:
            chunk: the chunk they will belong to; each of its layers has all projections.
            targets: projections in `FUSED`, and `EXPERT_TARGETS`.
            hyperparams: rank, scale and dropout.
        """
        super().__init__()
        self.enabled = True
        """Whether the linears use them; if False, the chunk computes the base model."""
        self.layer_indices = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        self.layers = torch.nn.ModuleList()
        for layer in chunk.decoder.layers:
            adapters = torch.nn.ModuleDict()
            for name, fused in FUSED.items():
                adapted = [projection for projection in fused if projection in targets]
                if adapted:
                    linear = layer_linear(layer, name)
                    assert linear is not None
                    rows = _fused_rows(name, linear)
                    adapters[name] = LinearAdapters(linear, rows, adapted, hyperparams)
            in_experts = _in_experts(targets)
            if in_experts and layer_experts(layer) is not None:
                names = [target.removeprefix(f"{EXPERTS_NAME}.") for target in in_experts]
                adapters[EXPERTS_NAME] = ExpertAdapters(layer.mlp, names, hyperparams)
            self.layers.append(adapters)

    def linears(self) -> Iterator[tuple[int, str, LinearAdapters]]:
        """Global layer index (from 0), megatron-core's name and adapters of each linear."""
        for layer, adapters in zip(self.layer_indices, self.layers, strict=True):
            assert isinstance(adapters, torch.nn.ModuleDict)
            for name, linear_adapters in adapters.items():
                if isinstance(linear_adapters, LinearAdapters):
                    yield layer, name, linear_adapters

    def experts(self) -> Iterator[tuple[int, ExpertAdapters]]:
        """Global layer index (from 0) and adapters of each layer's experts."""
        for layer, adapters in zip(self.layer_indices, self.layers, strict=True):
            assert isinstance(adapters, torch.nn.ModuleDict)
            if EXPERTS_NAME in adapters:
                of_layer = adapters[EXPERTS_NAME]
                assert isinstance(of_layer, ExpertAdapters)
                yield layer, of_layer

    def merged_weights(self) -> Iterator[tuple[torch.nn.Parameter, Callable[[], Tensor]]]:
        """Each adapted weight of this rank, and what computes it with its adapters, in fp32."""
        for _, _, adapted in self.linears():
            yield adapted.linear.weight, adapted.merged_weight
        for _, of_layer in self.experts():
            for weight, target, expert in of_layer.merged_weights():
                yield weight, partial(of_layer.merged_weight, target, expert)

    def tensors(self) -> Iterator[AdapterTensor]:
        """All A and B on this rank."""
        for layer, _, adapters in self.linears():
            split_down, split_up = (None, 0) if adapters.is_column_parallel else (1, None)
            for name in adapters.targets:
                yield AdapterTensor(layer, name, "A", adapters.down(name), split_down)
                yield AdapterTensor(layer, name, "B", adapters.up(name), split_up)
        for layer, of_layer in self.experts():
            for target in of_layer.targets:
                for side, parameter in (("A", of_layer.down(target)), ("B", of_layer.up(target))):
                    yield AdapterTensor(
                        layer,
                        f"{EXPERTS_NAME}.{target}",
                        side,
                        parameter,
                        of_layer.split_dim(target, side),
                        of_layer.first_expert,
                    )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the adapters for a distributed checkpoint.

        The dictionary's keys are local to this chunk, the tensors' keys are global, so that any
        layout can read what another wrote. Each tensor is the parameter itself.
        """
        from megatron.core.dist_checkpointing import ShardedTensor

        rank = rank_coordinates()
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        state = {}
        for tensor in self.tensors():
            dim, (tp_rank, tp_size) = tensor.split_dim, rank.tp(is_expert=tensor.is_expert)
            offsets = [] if dim is None else [(dim, tp_rank, tp_size)]
            if tensor.is_expert:
                offsets.insert(0, (0, rank.ep_rank, rank.ep_size))
            # megatron-core saves the copy with an all-zero replica id. Tensor-parallel ranks hold
            # copies of a replicated tensor, but different shards of a split one.
            data_rank = rank.replica(is_expert=tensor.is_expert)
            replica_id = (0, tp_rank if dim is None else 0, data_rank)
            state[f"{prefix}{names[id(tensor.parameter)]}"] = ShardedTensor.from_rank_offsets(
                tensor.name, tensor.parameter, *offsets, replica_id=replica_id
            )
        return state


def layer_linear(layer: torch.nn.Module, name: str) -> ParallelLinear | None:
    """One of the linears in `FUSED`; None if it cannot have an adapter, or is of experts."""
    parent = getattr(layer, "self_attention" if name in ("linear_qkv", "linear_proj") else "mlp")
    linear = getattr(parent, name, None)
    return linear if is_adaptable(linear) else None


def layer_experts(layer: torch.nn.Module) -> Any:
    """The experts of a layer; None if its MLP is dense."""
    return getattr(layer.mlp, "experts", None)


def has_adapters(chunk: GPTModel) -> bool:
    """Whether the chunk has adapters."""
    return hasattr(chunk, ADAPTERS_NAME)


def missing_linears(chunk: GPTModel, targets: Sequence[str]) -> list[Problem]:
    """Targets that cannot have an adapter in this chunk, and why."""
    problems = []
    for name, fused in FUSED.items():
        adapted = ", ".join(projection for projection in fused if projection in targets)
        lacking = [layer for layer in chunk.decoder.layers if layer_linear(layer, name) is None]
        if not adapted or not lacking:
            continue
        if chunk.config.num_moe_experts and name in ("linear_fc1", "linear_fc2"):
            message = "are experts in this model"
            remedy = "name them in lora.target_parameters: mlp.experts.gate_up_proj"
        else:
            layer_number = lacking[0].layer_number
            message = f"need a parallel {name} of megatron-core, which layer {layer_number} lacks"
            remedy = "build the model with build_model(), or name other targets"
        problems.append(Problem("lora.targets", f"{adapted} {message}", remedy))
    if _in_experts(targets) and chunk.decoder.layers:
        problems += _expert_problems(chunk)
    return problems


def _in_experts(targets: Sequence[str]) -> list[str]:
    return [target for target in targets if target in EXPERT_TARGETS]


def _expert_problems(chunk: GPTModel) -> list[Problem]:
    location = "lora.target_parameters"
    if not chunk.config.num_moe_experts:
        remedy = "leave it out and name the projections in lora.targets"
        return [Problem(location, "names experts, but this model is dense", remedy)]
    experts = [layer_experts(layer) for layer in chunk.decoder.layers]
    if all(of_layer is None or isinstance(of_layer, GroupedExperts) for of_layer in experts):
        return []
    message = "needs experts that are computed together"
    remedy = "build the model with ModelOptions(transformer_engine=False, grouped_experts=True)"
    return [Problem(location, message, remedy)]


def insert_adapters(
    chunk: GPTModel, targets: Sequence[str], hyperparams: LoraHyperparams
) -> ChunkAdapters:
    """Add adapters to the chunk as a submodule and make its linears use them."""
    assert not has_adapters(chunk)
    adapters = ChunkAdapters(chunk, targets, hyperparams)
    round_once(chunk)
    for _, _, linear_adapters in adapters.linears():
        _patch_linear(linear_adapters, adapters)
    for _, of_layer in adapters.experts():
        _patch_experts(of_layer, adapters)
    adapters.train(chunk.training)
    setattr(chunk, ADAPTERS_NAME, adapters)
    return adapters


def round_once(chunk: GPTModel) -> None:
    """Compute frozen 16-bit linears by `frozen_forward`, as those with adapters are.

    For equal rounding: of all linears of a model with adapters, and of a model that is compared
    with it. `remove_adapters` undoes it.
    """
    for linear in _adaptable_linears(chunk):
        if rounds_once(linear):
            linear.forward = partial(frozen_forward, linear, low_rank=None)


def _adaptable_linears(chunk: GPTModel) -> Iterator[ParallelLinear]:
    """The linears in `FUSED` of all layers that can have adapters."""
    for layer in chunk.decoder.layers:
        for name in FUSED:
            if (linear := layer_linear(layer, name)) is not None:
                yield linear


def remove_adapters(chunk: GPTModel) -> None:
    """Undo `insert_adapters`."""
    adapters: ChunkAdapters = getattr(chunk, ADAPTERS_NAME)
    for linear in _adaptable_linears(chunk):
        linear.__dict__.pop("forward", None)
    for _, of_layer in adapters.experts():
        of_layer.experts.add_adapters = None
    delattr(chunk, ADAPTERS_NAME)


def freeze(chunk: GPTModel) -> RestoreFn:
    """Set `requires_grad=False` on all parameters of the chunk; call before inserting adapters."""
    trainable = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)

    def restore() -> None:
        for parameter in trainable:
            parameter.requires_grad_(True)

    return restore


def _patch_linear(adapters: LinearAdapters, chunk_adapters: ChunkAdapters) -> None:
    """Make a linear's `forward` add its adapters' contribution."""
    linear = adapters.linear

    # The adapters are computed through the module's __call__: with `overlap_param_gather`, DDP's
    # pre-hooks wait there for the all-gather of their parameters.
    def forward_once(input_t1I: Tensor) -> tuple[Tensor, Tensor | None]:
        low_rank: LowRank | None = adapters(input_t1I) if chunk_adapters.enabled else None
        return frozen_forward(linear, input_t1I, low_rank)

    base_forward, with_input = linear.forward, forward_with_input(linear)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not chunk_adapters.enabled:
            unadapted: tuple[Tensor, Tensor | None] = base_forward(*args, **kwargs)
            return unadapted
        input_t1I, output_t1O, bias_O = with_input(*args, **kwargs)
        return add_low_rank(output_t1O, adapters(input_t1I)), bias_O

    linear.forward = forward_once if rounds_once(linear) else forward


def _patch_experts(of_layer: ExpertAdapters, chunk_adapters: ChunkAdapters) -> None:
    """Make the experts of a layer add their adapters' contributions."""

    def add_adapters(linear: str, tokens_NI: Tensor, ends_E: Tensor, output_NO: Tensor) -> Tensor:
        if not chunk_adapters.enabled:
            return output_NO
        adapted_NO: Tensor = of_layer(linear, tokens_NI, ends_E, output_NO)
        return adapted_NO

    of_layer.experts.add_adapters = add_adapters


def _fused_rows(name: str, linear: ParallelLinear) -> FusedRows:
    """The layout of a linear's rows on this rank."""
    config, num_rows = linear.config, linear.weight.shape[0]
    if name != "linear_qkv":
        fused = FUSED[name]
        return FusedRows(1, dict.fromkeys(fused, num_rows // len(fused)))
    # Per query group: the query heads that share a key-value head, then its key and its value.
    groups = config.num_query_groups // linear.tp_group.size()
    head_dim = config.kv_channels
    query_rows = num_rows // groups - 2 * head_dim
    return FusedRows(groups, dict(zip(FUSED[name], (query_rows, head_dim, head_dim), strict=True)))
