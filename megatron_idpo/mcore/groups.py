"""This rank's place in megatron-core's process groups, and the few collectives we run over them.

Valid between `Layout.start` and `Layout.stop`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank stands in each dimension of the layout, counted from 0."""

    tensor: int
    tensor_size: int
    pipeline: int
    data: int
    """Over data and context parallel ranks, which hold the same parameters."""


def this_place() -> Place:
    """This rank's place in the running layout."""
    return Place(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def gather_tensor_shards(shard: Tensor) -> list[Tensor] | None:
    """The shards of all tensor-parallel ranks, on the first of them; None on the others.

    Collective over the tensor-parallel group: a gather forward; no gradient flows back.

    Args:
        shard: this rank's; every rank's has the same shape and dtype.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(size)] if rank == 0 else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return shards
