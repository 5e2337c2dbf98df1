"""Adapters of experts as PEFT stores them.

PEFT adapts `gate_up_proj [E, 2F, H]` and `down_proj [E, H, F]`, in which Transformers keeps the
experts of a layer, with two matrices each: A `[E * r, I]`, one expert after another, and
B `[O, r * E]`, whose columns change the expert first (`peft.tuners.lora.layer.ParamWrapper`). Here
a rank has A `[e, r, I]` and B `[e, O, r]`, or `[e, 2, F, r]` for gate and up, of its e experts.

Each adapted tensor wraps the module of the experts once more. The first one, `gate_up_proj`, is
inside: with both, its names have `base_layer` in them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_idpo.config.lora import EXPERT_PARAMETERS, ExpertParameter, LoraConfig
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.slicing import Shard
from megatron_idpo.mcore.lora.chunk import AdapterTensor
from megatron_idpo.mcore.parallel.groups import (
    RankCoordinates,
    gather_experts,
    gather_tensor_shards,
    rank_coordinates,
)


def expert_module(layer: int, target: str, settings: LoraConfig) -> str:
    """PEFT's module that adapts a target in the experts of a layer, which counts from 0."""
    wraps = len(settings.expert_parameters) - 1
    is_inner = settings.expert_parameters.index(_parameter(target)) < wraps
    return f"model.layers.{layer}.mlp.experts" + (".base_layer" if is_inner else "")


def gather_whole(tensor: AdapterTensor) -> Tensor | None:
    """A or B of all experts in PEFT's shape, on one rank of the expert replica; None on others.

    Collective over the expert-tensor-parallel group, and its first ranks' expert-parallel groups: a
    gather each, forward only.
    """
    whole = tensor.parameter.detach()
    if tensor.split_dim is not None:
        shards = gather_tensor_shards(whole, is_expert=True)
        if shards is None:
            return None
        whole = torch.cat(shards, tensor.split_dim)
    elif rank_coordinates().expert_tp_rank > 0:
        return None
    experts = gather_experts(whole)
    return None if experts is None else _to_peft(torch.cat(experts), tensor.side)


def read_experts(
    tensor: AdapterTensor, source: HfCheckpoint, name: str, rank: RankCoordinates
) -> None:
    """Fill this rank's part of A or B from PEFT's tensor of all experts."""
    target, (first, count) = tensor.parameter, (tensor.first_expert or 0, len(tensor.parameter))
    shard = Shard(rank.expert_tp_rank, rank.expert_tp_size)
    height, width = source.shape(name)
    if tensor.side == "A":
        r = target.shape[1]
        columns = None if tensor.split_dim is None else shard.of(width)
        rows = slice(first * r, (first + count) * r)
        target.copy_(source.read(name, rows, columns).view(target.shape))
        return
    for half, rows in _rows_of_b(tensor, height, shard):
        columns_by_expert = source.read(name, rows).unflatten(1, (target.shape[-1], -1))
        own = columns_by_expert[..., first : first + count]
        target[:, half].copy_(own.permute(2, 0, 1).view_as(target[:, half]))


def _rows_of_b(
    tensor: AdapterTensor, height: int, shard: Shard
) -> Iterator[tuple[int | slice, slice]]:
    """Where rows of PEFT's B belong into dimension 1 of this rank's."""
    if tensor.split_dim is None:
        yield slice(None), slice(0, height)
        return
    features = height // 2
    for half in range(2):
        part = shard.of(features)
        yield half, slice(half * features + part.start, half * features + part.stop)


def _to_peft(experts: Tensor, side: str) -> Tensor:
    if side == "A":
        return experts.flatten(0, 1)
    by_expert_EOr = experts.flatten(1, -2)
    return by_expert_EOr.permute(1, 2, 0).flatten(1, 2).contiguous()


def _parameter(target: str) -> ExpertParameter:
    (parameter,) = (name for name in EXPERT_PARAMETERS if name.endswith(target))
    return parameter
