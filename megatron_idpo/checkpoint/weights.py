"""A model's weights as a megatron-core `torch_dist` checkpoint, independent of the layout.

Saving and loading happen in the parameters' own memory, one tensor at a time. megatron-core keeps
SwiGLU's fused weight as two tensors in a checkpoint, so that any tensor parallelism can read it;
left to itself it copies every such weight at once, in both directions, which is half as much again
as the model. Here the halves are views.

Not here: optimizer state, schedules, atomic directories (`checkpoint/directory.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)

from megatron_idpo.checkpoint.dcp_io import DirectSave, read_into
from megatron_idpo.checkpoint.stored_weights import check_same_model
from megatron_idpo.mcore.lora.chunk import ADAPTERS_NAME
from megatron_idpo.mcore.megatron_warnings import quiet_megatron
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.parallel.world import gathered, raise_on_all_ranks

ShardedState = dict[str, Any]


def sharded_weights(chunks: Sequence[GPTModel], *, extra_state: bool = False) -> ShardedState:
    """What this rank contributes to, or takes from, a checkpoint of the model's own weights.

    Adapters are left out: a checkpoint of an adapted model's weights is one of the base model's.
    The values are megatron-core's sharded tensors, whose keys and offsets are global; the
    dictionary's own keys only keep this rank's chunks apart. Factories are applied, so every value
    is a view of a parameter.

    Args:
        chunks: this rank's model chunks.
        extra_state: add the modules' `_extra_state` (Transformer Engine's FP8 scales, else empty),
            which is no weight, but which other readers of a checkpoint miss if it is not there.
    """
    state: ShardedState = {}
    for number, chunk in enumerate(chunks):
        for key, value in chunk.sharded_state_dict().items():
            if key.startswith(f"{ADAPTERS_NAME}."):
                continue
            if extra_state or not isinstance(value, ShardedObject):
                state[f"chunk{number}.{key}"] = value
    apply_factories(state)
    return state


def save_weights(
    chunks: Sequence[GPTModel], directory: Path, *, location: Path | None = None
) -> None:
    """Write the weights of all ranks into an empty directory. Collective.

    Args:
        chunks: this rank's model chunks.
        directory: exists and is empty, the same on every rank.
        location: what to call it in errors, where it has a working name.

    Raises:
        CheckpointError: on every rank, when a file could not be written by any.
    """
    with quiet_megatron():
        dist_checkpointing.save(
            sharded_weights(chunks, extra_state=True),
            str(directory),
            DirectSave(location or directory),
        )


def load_weights(chunks: Sequence[GPTModel], directory: Path, architecture: Architecture) -> None:
    """Fill every parameter from a checkpoint saved in any layout, casting to the model's format.

    Collective: an all-gather of the weights' names; a failure on any rank is raised on all.

    Args:
        chunks: this rank's model chunks.
        directory: the checkpoint.
        architecture: what the chunks are.

    Raises:
        CheckpointError: no such checkpoint, a missing, unknown or wrong-shaped weight, a file that
            is missing, truncated or damaged.
    """
    tensors = list(_sharded_tensors(sharded_weights(chunks).values()))
    shapes = {one.key: tuple(one.global_shape) for one in tensors}
    everywhere = {key: shape for rank in gathered(shapes) for key, shape in rank.items()}
    with raise_on_all_ranks("loading the weights"):
        check_same_model(directory, everywhere, architecture.vocab_size, architecture.num_kv_heads)
        with quiet_megatron():
            read_into(tensors, directory)


def _sharded_tensors(values: Iterable[Any]) -> Iterator[ShardedTensor]:
    """The sharded tensors among nested values."""
    for value in values:
        if isinstance(value, dict):
            yield from _sharded_tensors(value.values())
        elif isinstance(value, list):
            yield from _sharded_tensors(value)
        elif isinstance(value, ShardedTensor):
            yield value
