"""The tensors of a training state: trained weights, fp32 main parameters, Adam's moments.

Only what learns is in it: under LoRA the adapters, and the base weights come from the base model
again. Keys are those of the weights, `optimizer.main.KEY`, `optimizer.exp_avg.KEY` and
`optimizer.exp_avg_sq.KEY`, all in the shape of the whole weight, so that every layout reads every
other's, with a distributed optimizer or without. Each copy of a shared weight (tied embeddings, the
plugin's replicas of the head) has the owner's key: one is saved, all are filled.

Not here: the numbers (`checkpoint/progress.py`), files (`checkpoint/box_files.py`). There is no
random state: a training step seeds its generators anew.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.checkpoint.chunk_io import read_chunks
from megatron_idpo.checkpoint.stored_weights import Expected, check_holds
from megatron_idpo.checkpoint.tensor_chunks import (
    Region,
    TensorChunk,
    regions_by_parameter,
    tensor_chunks_of,
)
from megatron_idpo.mcore.megatron_warnings import quiet_megatron
from megatron_idpo.mcore.optim.state import (
    MOMENTS,
    Held,
    held_parameters,
    set_steps_taken,
    steps_taken,
)
from megatron_idpo.mcore.parallel.world import gathered, raise_on_all_ranks

_STATE = "optimizer."
"""What the keys of optimizer state begin with."""

Regions = Mapping[torch.nn.Parameter, tuple[Region, ...]]


def snapshot(chunks: Sequence[Any], optimizer: Any) -> list[TensorChunk]:
    """A copy of what this rank writes into a checkpoint, in the host's memory.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
        optimizer: megatron-core's, of these chunks.
    """
    saved = [box for box in _boxes_to_save(chunks, optimizer) if box.saved_here]
    copies = [replace(box, tensor=_host_copy(box.tensor)) for box in saved]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies


def restore(chunks: Sequence[Any], optimizer: Any, directory: Path, *, steps: int) -> None:
    """Fill everything that learns, and the optimizer, from a checkpoint of any layout. Collective.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
        optimizer: megatron-core's, of these chunks.
        directory: the checkpoint.
        steps: how many steps its optimizer had taken; with 0 it has no moments.

    Raises:
        CheckpointError: on every rank; it is of another model or trains something else, or a file
            is missing, truncated or damaged.
    """
    set_steps_taken(optimizer, steps)
    boxes = list(_boxes_to_load(chunks, optimizer, with_moments=steps > 0))
    expected = _expected(chunks, with_moments=steps > 0)
    with raise_on_all_ranks("loading the checkpoint"):
        check_holds(directory, expected)
        with quiet_megatron():
            read_chunks(boxes, directory)


def total_steps(optimizer: Any) -> int:
    """How many steps the optimizer has taken, on every rank. Collective."""
    counts = {count for count in gathered(steps_taken(optimizer)) if count is not None}
    assert len(counts) <= 1, f"the ranks' optimizers have taken {counts} steps"
    return counts.pop() if counts else 0


def _boxes_to_save(chunks: Sequence[Any], optimizer: Any) -> Iterator[TensorChunk]:
    """Weights and state by the stretches that this rank's optimizer holds.

    Of a cut weight the own stretch: it is up to date, while the others' may still be on their way
    (`overlap_param_gather`).
    """
    regions = regions_by_parameter(chunks)
    for held in held_parameters(optimizer):
        weight = held.parameter.detach().view(-1)[held.start : held.stop]
        for region in regions[held.parameter]:
            yield from tensor_chunks_of(region, weight, held.start, is_cut=held.is_cut)
        yield from _state_boxes(held, regions, with_moments=held.main in held.inner.state)


def _boxes_to_load(
    chunks: Sequence[Any], optimizer: Any, *, with_moments: bool
) -> Iterator[TensorChunk]:
    """All of every weight that learns, and this rank's stretches of the state."""
    regions = regions_by_parameter(chunks)
    for parameter, own in regions.items():
        if parameter.requires_grad:
            for region in own:
                yield from tensor_chunks_of(region, parameter.detach().view(-1), 0)
    for held in held_parameters(optimizer):
        yield from _state_boxes(held, regions, with_moments=with_moments)


def _state_boxes(held: Held, regions: Regions, *, with_moments: bool) -> Iterator[TensorChunk]:
    tensors = held.moments() if with_moments else {}
    if held.has_main_copy:
        tensors["main"] = held.main
    for name, tensor in tensors.items():
        flat, prefix = tensor.detach().view(-1), f"{_STATE}{name}."
        for region in regions[held.parameter]:
            yield from tensor_chunks_of(region, flat, held.start, prefix=prefix, is_cut=held.is_cut)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the next step does not change; on a GPU it is only begun."""
    if not tensor.is_cuda:
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _expected(chunks: Sequence[Any], *, with_moments: bool) -> dict[str, Expected]:
    """What a checkpoint of this run holds. Collective: an all-gather of the weights' names."""
    shards = {
        (f"{prefix}{region.sharded.key}", tuple(region.sharded.global_offset)): Expected(
            tuple(region.sharded.global_shape),
            region.stop - region.start,
            region.sharded.allow_shape_mismatch,
        )
        for parameter, regions in regions_by_parameter(chunks).items()
        if parameter.requires_grad
        for region in regions
        for prefix in _prefixes(parameter, with_moments=with_moments)
    }
    whole: dict[str, Expected] = {}
    for (key, _), shard in {k: v for rank in gathered(shards) for k, v in rank.items()}.items():
        before = whole[key].elements if key in whole else 0
        whole[key] = replace(shard, elements=before + shard.elements)
    return whole


def _prefixes(parameter: torch.nn.Parameter, *, with_moments: bool) -> Iterator[str]:
    """Of the keys that belong to a parameter."""
    yield ""
    if parameter.dtype != torch.float32:
        yield f"{_STATE}main."
    if with_moments:
        yield from (f"{_STATE}{name}." for name in MOMENTS)
