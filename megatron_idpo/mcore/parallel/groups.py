"""megatron-core's process-wide state: process groups, this rank's coordinates, RNG tracker.

The coordinates and collectives are valid between `start_layout` and `stop_layout`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.cpu.redirect import backend
from megatron_idpo.mcore.parallel.world import all_gather_objects, collective_timeout
from megatron_idpo.mcore.watchdog.activity import set_stage

_STAGE_SEED_STRIDE = 100_000
"""Distance between the seeds of pipeline stages. megatron-core adds the tensor-parallel rank (plus
a constant) to a stage's seed, which is far less, so no two ranks share a seed."""


def start_layout(layout: Layout, seed: int = 0) -> None:
    """Create megatron-core's process groups for a layout and seed its RNG tracker.

    Every rank calls it, after `torch.distributed` is initialized and the model was checked.

    Args:
        layout: of the run.
        seed: of the RNG tracker; each pipeline stage adds 100 times its rank, as in Megatron-LM, so
            that stages draw different dropout masks.

    Raises:
        RuntimeError: a layout is already running in this process.
        ConfigError: this layout cannot run in this world.
    """
    if parallel_state.is_initialized():
        raise RuntimeError("megatron-core already runs a layout here; call stop_layout() first")
    layout.check(None, dist.get_world_size())
    timeout = collective_timeout() or default_pg_timeout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        # megatron-core takes any number, also 1, as a request for the interleaved schedule.
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        # For checkpoints of megatron-core, which a run does not write: on many GPUs each such group
        # is as many sockets per process as it has ranks.
        create_gloo_process_groups=backend() == "gloo",
        # Annotated as an integer, but only converted to a timedelta.
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    set_stage((stage, layout.pipeline))
    model_parallel_cuda_manual_seed(seed + 100 * stage)


def create_group(ranks: Sequence[int], *, backend: str | None = None) -> dist.ProcessGroup | None:
    """A process group that `stop_layout` destroys; None on other ranks.

    Collective: the ranks that create it, members or not, create all groups in the same order.

    Args:
        ranks: global ones.
        backend: None: the world's.
    """
    # In megatron-core's list of the groups of a layout.
    group = parallel_state.create_group(list(ranks), timeout=collective_timeout(), backend=backend)
    # A non-member gets the integer GroupMember.NON_GROUP_MEMBER instead of a group.
    return group if isinstance(group, dist.ProcessGroup) else None


def stop_layout(*, destroy_groups: bool = True) -> None:
    """Destroy the layout's groups and the RNG tracker's states; the world's group stays.

    Does nothing if no layout is running. Collective, as NCCL frees a communicator on all of its
    ranks together.

    Args:
        destroy_groups: megatron-core only forgets its groups, which then keep their communicators
            (on a GPU, each some hundred MB) until the world ends. False is right after an error:
            other ranks may not come here, and the world ends soon.
    """
    set_stage(None)
    if not parallel_state.is_initialized():
        return
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    get_cuda_rng_tracker().reset()
    # In the order of their creation, which is common to all ranks. None stands for the world.
    for group in filter(None, groups) if destroy_groups else ():
        # megatron-core has destroyed some of them itself.
        if group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def reset_megatron_state() -> None:
    """Reset all module globals of megatron-core, also after a job that failed midway.

    For a process that runs one job after another, like the workers of `megatron_idpo.testing`; a
    program that called `start_layout` calls `stop_layout` instead. Not collective; torch's default
    process group stays.
    """
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    # megatron-core has no function to reset the tracker; the next seeding creates a new one.
    megatron_random._CUDA_RNG_STATE_TRACKER = None
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    megatron_random._unset_checkpointing()


@dataclass(frozen=True, slots=True)
class RankCoordinates:
    """This rank's index in each dimension of the layout, from 0."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    dp_rank: int
    """Over data- and context-parallel ranks, which hold the same parameters (but for experts)."""

    data_rank: int = 0
    """Over data-parallel ranks, which have different rows. Context-parallel ranks share theirs."""

    context_rank: int = 0
    """Among the ranks that share the positions of a row."""

    ep_rank: int = 0
    """Among the ranks that share the experts."""

    ep_size: int = 1
    expert_tp_rank: int = 0
    """Among the ranks that share the matrices of an expert."""

    expert_tp_size: int = 1
    expert_dp_rank: int = 0
    """Among the ranks that hold the same experts."""

    def tp(self, *, is_expert: bool) -> tuple[int, int]:
        """Rank and size in the tensor parallelism of a parameter."""
        if is_expert:
            return self.expert_tp_rank, self.expert_tp_size
        return self.tp_rank, self.tp_size

    @property
    def counts_rows(self) -> bool:
        """Whether this rank adds values of its rows to a sum over all ranks of a stage.

        Tensor- and context-parallel ranks have the same rows and equal values.
        """
        return self.tp_rank == 0 and self.context_rank == 0

    def replica(self, *, is_expert: bool) -> int:
        """Index of this rank's copy of a parameter among the data-parallel ranks."""
        return self.expert_dp_rank if is_expert else self.dp_rank


def rank_coordinates() -> RankCoordinates:
    """This rank's coordinates in the running layout."""
    return RankCoordinates(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        data_rank=parallel_state.get_data_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def data_parallel_size() -> int:
    """Number of ranks over which DDP averages gradients: data- and context-parallel."""
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


_GROUPS = ("tp", "pp", "cp", "dp_cp")
"""The names in a `ProcessGroupCollection` of the fields of `ModelGroups`, in their order."""


def _process_wide_groups() -> dict[str, dist.ProcessGroup]:
    """megatron-core's own groups by name; empty if there are none."""
    if not parallel_state.is_initialized():
        return {}
    return {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """The process groups of a model, which need not be megatron-core's process-wide ones."""

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data_and_context: dist.ProcessGroup
    """The ranks over which DDP averages gradients: data- and context-parallel."""

    @classmethod
    def of(cls, pg_collection: Any = None) -> Self:
        """The groups of a `ProcessGroupCollection`; megatron-core's process-wide ones without it.

        Raises:
            ConfigError: the collection has some groups that are not the process-wide ones, and
                lacks others, which could only be guessed.
        """
        known = _process_wide_groups()
        own: dict[str, Any] = {}
        for name in _GROUPS:
            given = getattr(pg_collection, name, None)
            own[name] = known.get(name) if given is None else given
        lacks = [name for name in _GROUPS if getattr(pg_collection, name, None) is None]
        if lacks and any(group is not known.get(name) for name, group in own.items()):
            message = f"lacks {', '.join(lacks)}, and has groups that are not megatron-core's own"
            raise ConfigError.at("pg_collection", message, f"set its {', '.join(_GROUPS)}")
        if missing := [name for name, group in own.items() if group is None]:
            remedy = "give the model's pg_collection, or call initialize_model_parallel first"
            raise ConfigError.at("pg_collection", f"lacks {', '.join(missing)}", remedy)
        return cls(*own.values())

    def gather[Value](self, value: Value) -> list[Value]:
        """The value of every rank of the model, in the same order on each of them.

        Collective over these ranks: an all-gather of a small object in each dimension. Other ranks
        of the world do not take part.
        """
        values = [value]
        for group in (self.tensor, self.pipeline, self.data_and_context):
            values = [one for part in all_gather_objects(values, group) for one in part]
        return values

    @property
    def tensor_rank(self) -> int:
        """This rank's index among the tensor-parallel ranks."""
        return dist.get_rank(self.tensor)

    @property
    def tensor_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.tensor.size()

    @property
    def data_size(self) -> int:
        """Number of ranks with different pairs."""
        return self.data_and_context.size() // self.context.size()

    @property
    def context_rank(self) -> int:
        """This rank's index among the context-parallel ranks."""
        return dist.get_rank(self.context)

    @property
    def batch_groups(self) -> tuple[tuple[int, ...], ...]:
        """Names of groups of ranks that get the same micro-batches: two ranks do if one is equal.

        The first is common to the tensor- and pipeline-parallel ranks of a data- and
        context-parallel one, the second to context-parallel ranks.
        """
        context_ranks = dist.get_process_group_ranks(self.context)
        return ((dist.get_rank(self.data_and_context),), (-1, *context_ranks))

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the pipeline stage with the final layer."""
        return dist.get_rank(self.pipeline) == self.pipeline.size() - 1

    @property
    def counts_pairs(self) -> bool:
        """Whether this rank adds its pairs to a count over the model: one rank of each copy."""
        is_first_copy = self.tensor_rank == 0 and self.context_rank == 0
        return self.is_last_stage and is_first_copy


def gather_tensor_shards(shard: Tensor, *, is_expert: bool = False) -> list[Tensor] | None:
    """The shards of all tensor-parallel ranks, on the first of them; None on the others.

    Collective over the tensor-parallel group: a gather forward; no gradient flows back.

    Args:
        shard: this rank's; same shape and dtype on every rank.
        is_expert: of an expert's parameter, whose tensor-parallel group may be another one.
    """
    if is_expert:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return _gather(shard, group)


def gather_experts(experts: Tensor) -> list[Tensor] | None:
    """The experts of all expert-parallel ranks, on the first of them; None on the others.

    Collective over the expert-parallel group: a gather forward; no gradient flows back.

    Args:
        experts: this rank's, stacked; same shape and dtype on every rank.
    """
    return _gather(experts, parallel_state.get_expert_model_parallel_group())


def _gather(shard: Tensor, group: Any) -> list[Tensor] | None:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(size)] if rank == 0 else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return shards


def seed_rng_for_step(seed: int, step: int) -> None:
    """Seed this rank's random number generators for one step. Not collective.

    The seed is a function of (seed, step, rank), so there is no generator state to save: a resumed
    run draws the numbers of an uninterrupted one, and an evaluation between two steps changes
    nothing. Tensor-parallel ranks share torch's default generator and differ in the tracker's
    (dropout masks of replicated activations must agree, those of sharded ones must differ); stages,
    data-parallel and context-parallel ranks, which have different positions, differ in both.

    Args:
        seed: of the run.
        step: of the optimizer, any integer.
    """
    rank = rank_coordinates()
    # `dp_rank` counts data- and context-parallel ranks together.
    # A hash instead of a sum: seed 1 at step 2 must not draw like seed 2 at step 1.
    key = f"{seed}/{step}/{rank.dp_rank}".encode()
    step_seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest())
    model_parallel_cuda_manual_seed(step_seed + _STAGE_SEED_STRIDE * (1 + rank.pp_rank))
