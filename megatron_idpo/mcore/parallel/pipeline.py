"""Pipeline stages of the running layout: which one this rank has, their groups, the schedule."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.parallel.groups import ModelGroups, create_group

ForwardStep = Callable[[Iterator[Any], Any], tuple[Any, Callable[[Any], Any]]]
"""megatron-core's `forward_step_func`: from an iterator of micro-batches and a model chunk to the
chunk's output and the loss function of the last stage."""


def is_last_stage() -> bool:
    """Whether this rank has the pipeline stage with the final layer."""
    group = parallel_state.get_pipeline_model_parallel_group()
    return bool(dist.get_rank(group) == group.size() - 1)


def broadcast_from_last_stage(tensor: Tensor) -> Tensor:
    """The last stage's tensor, on every stage. Collective over the pipeline group: a broadcast.

    Args:
        tensor: same shape and dtype on all stages; overwritten in place on all but the last. No
            gradient flows.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=group.size() - 1)
    return tensor


@dataclass(frozen=True, slots=True)
class StageGroup:
    """A process group over some stages of this rank's pipeline."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    """Global ranks, from the first stage to the last."""


def stage_group(groups: ModelGroups, *, is_member: bool, needs_group: bool) -> StageGroup | None:
    """Create a group of the member stages in every pipeline where a stage needs one.

    Collective over the model: gathers of a small object, then `create_group` calls.

    Args:
        groups: of the model.
        is_member: whether this rank belongs to its pipeline's group.
        needs_group: whether this rank will use it; without such a rank, the pipeline gets none.

    Returns:
        The group of this rank's pipeline; None if it has none or this rank is not a member.

    Raises:
        ConfigError: on every rank; a group is needed, the model is on a part of the world, and NCCL
            can create a group only on all ranks together.
    """
    pipeline = tuple(dist.get_process_group_ranks(groups.pipeline))
    gathered = groups.gather((dist.get_rank(), (pipeline, is_member, needs_group)))
    by_rank = dict(gathered)
    if any(needs for _, _, needs in by_rank.values()) and len(by_rank) < dist.get_world_size():
        _check_can_create_alone()
    own_group: StageGroup | None = None
    # torch names groups by their number, so all ranks of the model create every group, also those
    # of other pipelines, in the same (sorted) order. Otherwise later groups pair up wrongly, or
    # hang; local synchronization counts on members only.
    for ranks in sorted({pipeline_ranks for pipeline_ranks, _, _ in by_rank.values()}):
        members = tuple(rank for rank in ranks if by_rank[rank][1])
        if any(by_rank[rank][2] for rank in ranks):
            group = create_group(members)
            if group is not None:
                own_group = StageGroup(group, members)
    return own_group


def _check_can_create_alone() -> None:
    # torch then splits each new group from the world's communicator, a collective of the world:
    # ranks that call nothing would be waited for.
    device = distributed_c10d._get_default_group().bound_device_id
    if device is not None:
        message = f"was called with {device}, and the model is on some ranks of the world only"
        remedy = "call it without device_id, or attach a model that is on all ranks"
        raise ConfigError.at("init_process_group(device_id)", message, remedy)


def run_schedule(
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    model: Sequence[Any],
    *,
    row_tokens: int,
    training: bool,
    micro_batch_size: int = 1,
) -> None:
    """Run one global batch through megatron-core's pipeline schedule.

    Collective over the pipeline.

    Args:
        forward_step: called for every micro-batch and chunk.
        micro_batches: of this data-parallel rank, the same on every stage.
        model: this rank's chunks, in DDP or not.
        row_tokens: positions of every row.
        training: also run backward; if False, no graph is recorded.
        micro_batch_size: rows of every micro-batch.
    """
    with torch.set_grad_enabled(training):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            # One iterator per chunk: with interleaving each chunk reads all micro-batches.
            data_iterator=[iter(micro_batches) for _ in model],
            model=list(model),
            num_microbatches=len(micro_batches),
            seq_length=row_tokens,
            micro_batch_size=micro_batch_size,
            forward_only=not training,
        )
