"""This rank's place in megatron-core's process groups, and the few collectives we run over them.

Valid between `Layout.start` and `Layout.stop`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RankCoordinates:
    """Where this rank stands in each dimension of the layout, counted from 0."""

    tensor: int
    tensor_size: int
    pipeline: int
    data: int
    """Over data and context parallel ranks, which hold the same parameters."""


def this_rank() -> RankCoordinates:
    """This rank's place in the running layout."""
    return RankCoordinates(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def is_last_stage() -> bool:
    """Whether this rank's is the pipeline stage with the final layer."""
    group = parallel_state.get_pipeline_model_parallel_group()
    return bool(dist.get_rank(group) == group.size() - 1)


def data_parallel_size() -> int:
    """Ranks over which DDP averages gradients: data and context parallel."""
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def tensor_group() -> dist.ProcessGroup:
    """This rank's tensor-parallel group."""
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


@dataclass(frozen=True, slots=True)
class StageGroup:
    """Some of the stages of this rank's pipeline, as a process group."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    """Global ranks, from the first stage to the last."""


def stage_group(*, takes_part: bool, needs_it: bool) -> StageGroup | None:
    """A group of those stages of this rank's pipeline that take part.

    Collective over the world: an all-gather of a small object, and every rank creates every group,
    as `torch.distributed.new_group` wants it. Ranks of different pipelines get different groups.

    Args:
        takes_part: whether this rank belongs to its pipeline's group.
        needs_it: whether it wants one; where no stage does, none is made.

    Returns:
        None where none is needed, or where this rank takes no part.
    """
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    pipeline = tuple(dist.get_process_group_ranks(pipeline_group))
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (pipeline, takes_part, needs_it))
    mine: StageGroup | None = None
    for ranks in sorted({line for line, _, _ in answers}):
        members = tuple(rank for rank in ranks if answers[rank][1])
        if any(answers[rank][2] for rank in ranks):
            group = dist.new_group(list(members))
            if isinstance(group, dist.ProcessGroup):  # a non-member gets a number
                mine = StageGroup(group, members)
    return mine


def from_last_stage(tensor: Tensor) -> Tensor:
    """The last pipeline stage's tensor, on every stage. Collective over the pipeline: a broadcast.

    Args:
        tensor: of one shape and dtype on all stages; the others' is overwritten. No gradient flows.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=group.size() - 1)
    return tensor


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
