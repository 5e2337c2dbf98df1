"""All adapters of one model chunk, as one submodule of it.

The chunk's own modules keep their names, parameters and checkpoint keys; its linears' `forward` is
replaced on the instance, and put back by `remove_adapters`. The adapters lie in `chunk.lora`, so
that DDP, the optimizer and distributed checkpoints find them like any parameter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.lora.linear import (
    FusedRows,
    LinearAdapters,
    LoraHyperparams,
    ParallelLinear,
)
from megatron_idpo.mcore.model.chunk import RestoreFn
from megatron_idpo.mcore.parallel.groups import rank_coordinates

ADAPTERS_NAME = "lora"
"""The submodule's name in a chunk, and the prefix of its parameters' names and checkpoint keys."""

FUSED = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""megatron-core's linears of a layer, and the projections that are fused in each."""


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """A or B of one projection, on this rank."""

    layer: int
    """Counted from 0 over the whole model."""

    projection: str
    side: str
    """`A` or `B`."""

    parameter: torch.nn.Parameter
    split_dim: int | None
    """The dimension that tensor parallelism splits; None where every rank has all of it."""

    @property
    def name(self) -> str:
        """The same in every layout."""
        return f"{ADAPTERS_NAME}.layers.{self.layer}.{self.projection}.{self.side}"


class ChunkAdapters(torch.nn.Module):
    """The adapters of a chunk's layers; `layers[local number][linear]` are `LinearAdapters`."""

    def __init__(self, chunk: GPTModel, targets: Sequence[str], numbers: LoraHyperparams) -> None:
        """Allocate them: A uninitialised, B zero.

        Args:
            chunk: the chunk they will belong to; every layer has every target.
            targets: projections, of those in `FUSED`.
            numbers: rank, scale and dropout.
        """
        super().__init__()
        self.enabled = True
        """Whether the linears use them; else the chunk computes what it did without."""
        self.layer_numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        self.layers = torch.nn.ModuleList()
        for layer in chunk.decoder.layers:
            adapters = torch.nn.ModuleDict()
            for name, fused in FUSED.items():
                wanted = [projection for projection in fused if projection in targets]
                if wanted:
                    linear = layer_linear(layer, name)
                    assert linear is not None
                    rows = _fused_rows(name, linear)
                    adapters[name] = LinearAdapters(linear, rows, wanted, numbers)
            self.layers.append(adapters)

    def linears(self) -> Iterator[tuple[int, str, LinearAdapters]]:
        """Layer number (from 0, global), megatron-core's name and adapters of each linear."""
        for number, adapters in zip(self.layer_numbers, self.layers, strict=True):
            assert isinstance(adapters, torch.nn.ModuleDict)
            for name, one in adapters.items():
                assert isinstance(one, LinearAdapters)
                yield number, name, one

    def tensors(self) -> Iterator[AdapterTensor]:
        """Every A and B of this rank's part of the chunk."""
        for layer, _, adapters in self.linears():
            split_down, split_up = (None, 0) if adapters.is_column_parallel else (1, None)
            for name in adapters.targets:
                yield AdapterTensor(layer, name, "A", adapters.down(name), split_down)
                yield AdapterTensor(layer, name, "B", adapters.up(name), split_up)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the adapters for a distributed checkpoint.

        The dictionary's keys are this chunk's, those of the tensors global: any layout reads what
        another wrote. Each tensor is the parameter itself.
        """
        from megatron.core.dist_checkpointing import ShardedTensor

        rank = rank_coordinates()
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        state = {}
        for one in self.tensors():
            dim = one.split_dim
            offsets = [] if dim is None else [(dim, rank.tp_rank, rank.tp_size)]
            copy = (0, rank.tp_rank if dim is None else 0, rank.dp_rank)
            state[f"{prefix}{names[id(one.parameter)]}"] = ShardedTensor.from_rank_offsets(
                one.name, one.parameter, *offsets, replica_id=copy
            )
        return state


def layer_linear(layer: torch.nn.Module, name: str) -> ParallelLinear | None:
    """One of the linears in `FUSED`; None if the layer has none of megatron-core's under the name.

    So it is with Transformer Engine's, some of which hide the norm's output that A multiplies, and
    with experts.
    """
    parent = getattr(layer, "self_attention" if name in ("linear_qkv", "linear_proj") else "mlp")
    linear = getattr(parent, name, None)
    if not isinstance(linear, ColumnParallelLinear | RowParallelLinear) or linear.is_expert:
        return None
    return linear


def has_adapters(chunk: GPTModel) -> bool:
    """Whether adapters were added and not removed again."""
    return hasattr(chunk, ADAPTERS_NAME)


def missing_linears(chunk: GPTModel, targets: Sequence[str]) -> list[Problem]:
    """Why some targets cannot get an adapter in this chunk."""
    found = []
    wanted = [name for name, fused in FUSED.items() if any(one in targets for one in fused)]
    for name in wanted:
        lacking = [layer for layer in chunk.decoder.layers if layer_linear(layer, name) is None]
        if not lacking:
            continue
        named = ", ".join(one for one in FUSED[name] if one in targets)
        if chunk.config.num_moe_experts and name in ("linear_fc1", "linear_fc2"):
            message, remedy = "are experts in this model", "adapt the attention only"
        else:
            message = f"have no {name} of megatron-core's own in layer {lacking[0].layer_number}"
            remedy = "build the model with ModelOptions(transformer_engine=False)"
        found.append(Problem("lora.targets", f"{named} {message}", remedy))
    return found


def insert_adapters(
    chunk: GPTModel, targets: Sequence[str], numbers: LoraHyperparams
) -> ChunkAdapters:
    """Make the adapters a submodule of the chunk and let its linears use them."""
    assert not has_adapters(chunk)
    adapters = ChunkAdapters(chunk, targets, numbers)
    for _, _, one in adapters.linears():
        _enter(one, adapters)
    adapters.train(chunk.training)
    setattr(chunk, ADAPTERS_NAME, adapters)
    return adapters


def remove_adapters(chunk: GPTModel) -> None:
    """Undo `insert_adapters`."""
    for _, _, one in getattr(chunk, ADAPTERS_NAME).linears():
        del one.linear.forward
    delattr(chunk, ADAPTERS_NAME)


def freeze(chunk: GPTModel) -> RestoreFn:
    """No parameter of the chunk learns any more; to be called before adapters are inserted."""
    learning = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)

    def undo() -> None:
        for parameter in learning:
            parameter.requires_grad_(True)

    return undo


def _enter(adapters: LinearAdapters, switch: ChunkAdapters) -> None:
    """Let a linear's output pass through its adapters.

    They are called as a module: DDP's pre-hooks wait there for their parameters where those are
    gathered behind the forward pass (`overlap_param_gather`).
    """
    linear = adapters.linear
    ordinary = linear.forward

    def adapted(input_t1I: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output_t1O, bias_O = ordinary(input_t1I, *args, **kwargs)
        if switch.enabled:
            output_t1O = adapters(input_t1I, output_t1O)
        return output_t1O, bias_O

    linear.forward = adapted


def _fused_rows(name: str, linear: ParallelLinear) -> FusedRows:
    """How the rows of a linear's output fall to its projections, on this rank."""
    config, num_rows = linear.config, linear.weight.shape[0]
    if name != "linear_qkv":
        fused = FUSED[name]
        return FusedRows(1, dict.fromkeys(fused, num_rows // len(fused)))
    groups = config.num_query_groups // linear.tp_group.size()
    head = config.kv_channels
    queries = num_rows // groups - 2 * head
    return FusedRows(groups, dict(zip(FUSED[name], (queries, head, head), strict=True)))
