"""The tensors of a training state: trained weights, fp32 main parameters, Adam's moments.

Only what is trained is saved: with LoRA the adapters, while the base weights come from the base
model. Keys are those of the weights, `optimizer.main.KEY`, `optimizer.exp_avg.KEY` and
`optimizer.exp_avg_sq.KEY`, all in the shape of the whole weight, so every layout can read the
checkpoint of any other, with or without a distributed optimizer. Copies of a shared weight (tied
embeddings, the plugin's replicas of the head) have the owner's key: one is saved, all are filled.

There is no random state: each training step seeds its generators (`checkpoint/metadata.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_idpo.checkpoint.contents import Contents
from megatron_idpo.checkpoint.dcp_planner import read_chunks_together
from megatron_idpo.checkpoint.stored_weights import ExpectedTensor, check_trained_tensors
from megatron_idpo.checkpoint.tensor_chunks import (
    Region,
    TensorChunk,
    regions_by_parameter,
    tensor_chunks_of,
)
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.mcore.optim.state import (
    MOMENTS,
    ShardedParam,
    optimizer_step,
    set_optimizer_step,
    sharded_params,
)
from megatron_idpo.mcore.parallel.replicas import Replicas, is_expert_parameter
from megatron_idpo.mcore.parallel.world import all_gather_objects, read_on_rank0

_STATE_PREFIX = "optimizer."

Regions = Mapping[torch.nn.Parameter, tuple[Region, ...]]


def copy_state(model_chunks: Sequence[Any], optimizer: Any) -> list[TensorChunk]:
    """A copy in CPU memory of what this rank writes into a checkpoint.

    Args:
        model_chunks: of this rank, bare or wrapped.
        optimizer: megatron-core's, of these model chunks.
    """
    chunks = [chunk for chunk in _chunks_to_save(model_chunks, optimizer) if chunk.saved_here]
    copies = [replace(chunk, tensor=_cpu_copy(chunk.tensor)) for chunk in chunks]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # the copies are asynchronous
    return copies


def restore_state(
    model_chunks: Sequence[Any], optimizer: Any, contents: Contents, *, steps: int
) -> None:
    """Fills all trained tensors and the optimizer from a checkpoint of any layout. Collective.

    Args:
        model_chunks: of this rank, bare or wrapped.
        optimizer: megatron-core's, of these model chunks.
        contents: of the checkpoint, its small files checked.
        steps: that its optimizer had taken; with 0 it has no moments.

    Raises:
        CheckpointError: on every rank; it is of another model or trains other tensors, or a file is
            missing, truncated or damaged.
    """
    set_optimizer_step(optimizer, steps)
    chunks = list(_chunks_to_load(model_chunks, optimizer, with_moments=steps > 0))
    expected = _expected_tensors(model_chunks, with_moments=steps > 0)
    metadata = read_on_rank0(
        "loading the checkpoint", lambda: check_trained_tensors(contents, expected)
    )
    with suppress_megatron_warnings():
        read_chunks_together(chunks, contents.directory, contents, metadata)


def total_steps(optimizer: Any) -> int:
    """The number of steps that the optimizer has taken, on every rank. Collective."""
    counts = {count for count in all_gather_objects(optimizer_step(optimizer)) if count is not None}
    assert len(counts) <= 1, f"the ranks' optimizers have taken {counts} steps"
    return counts.pop() if counts else 0


def _chunks_to_save(model_chunks: Sequence[Any], optimizer: Any) -> Iterator[TensorChunk]:
    """Weights and optimizer state, in the ranges that this rank's optimizer updates.

    With a distributed optimizer, only this rank's range of a weight is taken: it is up to date,
    while the others may still be in an all-gather (`overlap_param_gather`).
    """
    regions = regions_by_parameter(model_chunks)
    for shard in sharded_params(optimizer):
        weight = shard.parameter.detach().view(-1)[shard.start : shard.stop]
        for region in regions[shard.parameter]:
            yield from tensor_chunks_of(region, weight, shard.start, is_partitioned=shard.is_cut)
        yield from _state_chunks(shard, regions, with_moments=shard.main in shard.inner.state)


def _chunks_to_load(
    model_chunks: Sequence[Any], optimizer: Any, *, with_moments: bool
) -> Iterator[tuple[TensorChunk, Replicas | None]]:
    """All of every trained weight, and this rank's ranges of the optimizer state.

    With the ranks that need the same values; None: no other rank does.
    """
    regions = regions_by_parameter(model_chunks)
    replicas = {is_expert: Replicas.running(is_expert=is_expert) for is_expert in (False, True)}
    for parameter, parameter_regions in regions.items():
        if parameter.requires_grad:
            for region in parameter_regions:
                for chunk in tensor_chunks_of(region, parameter.detach().view(-1), 0):
                    yield chunk, replicas[is_expert_parameter(parameter)]
    for shard in sharded_params(optimizer):
        is_expert = is_expert_parameter(shard.parameter)
        for chunk in _state_chunks(shard, regions, with_moments=with_moments):
            yield chunk, None if shard.is_cut else replicas[is_expert]


def _state_chunks(
    shard: ShardedParam, regions: Regions, *, with_moments: bool
) -> Iterator[TensorChunk]:
    tensors = shard.moments() if with_moments else {}
    if shard.has_main_copy:
        tensors["main"] = shard.main
    for name, tensor in tensors.items():
        for region in regions[shard.parameter]:
            yield from tensor_chunks_of(
                region,
                tensor.detach().view(-1),
                shard.start,
                prefix=f"{_STATE_PREFIX}{name}.",
                is_partitioned=shard.is_cut,
            )


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the next training step does not change; asynchronous from a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _expected_tensors(
    model_chunks: Sequence[Any], *, with_moments: bool
) -> dict[str, ExpectedTensor]:
    """Name -> what a checkpoint of this run holds. Collective: one all-gather of objects."""
    # Keyed by offset as well: a shard has copies on several ranks, which count once. The first of
    # data-parallel replicas lists it; with hundreds of ranks, the gathered lists would be large.
    is_listed = {
        is_expert: Replicas.running(is_expert=is_expert).rank == 0 for is_expert in (False, True)
    }
    local = {
        (f"{prefix}{region.sharded.key}", tuple(region.sharded.global_offset)): ExpectedTensor(
            tuple(region.sharded.global_shape),
            region.stop - region.start,
            region.sharded.allow_shape_mismatch,
        )
        for parameter, regions in regions_by_parameter(model_chunks).items()
        if parameter.requires_grad and is_listed[is_expert_parameter(parameter)]
        for region in regions
        for prefix in _key_prefixes(parameter, with_moments=with_moments)
    }
    shards = {key: shard for rank in all_gather_objects(local) for key, shard in rank.items()}
    expected: dict[str, ExpectedTensor] = {}
    for (name, _), shard in shards.items():
        elements = expected[name].elements if name in expected else 0
        expected[name] = replace(shard, elements=elements + shard.elements)
    return expected


def _key_prefixes(parameter: torch.nn.Parameter, *, with_moments: bool) -> Iterator[str]:
    """The prefixes of the keys that belong to a parameter."""
    yield ""
    if parameter.dtype != torch.float32:
        yield f"{_STATE_PREFIX}main."
    if with_moments:
        yield from (f"{_STATE_PREFIX}{name}." for name in MOMENTS)
