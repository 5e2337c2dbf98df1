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
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException

from megatron_idpo.checkpoint.contents import check_same_model
from megatron_idpo.checkpoint.strategy import DirectSave
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.architecture import Architecture
from megatron_idpo.mcore.model import GPTModel
from megatron_idpo.mcore.quiet import quiet_megatron
from megatron_idpo.mcore.world import agreeing, gathered

ShardedState = dict[str, Any]


def sharded_weights(chunks: Sequence[GPTModel]) -> ShardedState:
    """What this rank contributes to, or takes from, a checkpoint of the weights.

    The values are megatron-core's sharded tensors, whose keys and offsets are global; the
    dictionary's own keys only keep this rank's chunks apart. Factories are applied, so every value
    is a view of a parameter. Transformer Engine's `_extra_state` (FP8 scales) is left out.
    """
    state: ShardedState = {}
    for number, chunk in enumerate(chunks):
        for key, value in chunk.sharded_state_dict().items():
            if not isinstance(value, ShardedObject):
                state[f"chunk{number}.{key}"] = value
    apply_factories(state)
    return state


def save_weights(chunks: Sequence[GPTModel], directory: Path, *, place: Path | None = None) -> None:
    """Write the weights of all ranks into an empty directory. Collective.

    Args:
        chunks: this rank's model chunks.
        directory: exists and is empty, the same on every rank.
        place: what to call it in errors, where it has a working name.

    Raises:
        CheckpointError: on every rank, when a file could not be written by any.
    """
    with quiet_megatron():
        dist_checkpointing.save(
            sharded_weights(chunks), str(directory), DirectSave(place or directory)
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
    state = _largest_first(sharded_weights(chunks))
    shapes = {one.key: tuple(one.global_shape) for one in _sharded_tensors(state.values())}
    everywhere = {key: shape for rank in gathered(shapes) for key, shape in rank.items()}
    with agreeing("loading the weights"):
        check_same_model(directory, everywhere, architecture.vocab_size)
        try:
            with quiet_megatron():
                # megatron-core's integrity check would be a collective that a failing rank skips.
                dist_checkpointing.load(
                    state,
                    str(directory),
                    validate_access_integrity=False,
                    strict=StrictHandling.ASSUME_OK_UNEXPECTED,
                )
        except (CheckpointException, Exception) as error:  # the former is no Exception
            raise CheckpointError.at(
                str(directory), f"cannot be loaded ({_reason(error)})", "copy it here again"
            ) from error


def _largest_first(state: ShardedState) -> ShardedState:
    """The same state in another order.

    torch reads a tensor whole before it copies it. The largest, embedding and output layer, are
    read while the memory of the others is still untouched, so that this does not add to the peak.
    """

    def num_bytes(entry: tuple[str, Any]) -> int:
        return sum(one.data.nbytes for one in _sharded_tensors([entry[1]]))

    return dict(sorted(state.items(), key=num_bytes, reverse=True))


def _sharded_tensors(values: Iterable[Any]) -> Iterator[ShardedTensor]:
    """The sharded tensors among nested values."""
    for value in values:
        if isinstance(value, dict):
            yield from _sharded_tensors(value.values())
        elif isinstance(value, list):
            yield from _sharded_tensors(value)
        elif isinstance(value, ShardedTensor):
            yield value


def _reason(error: BaseException) -> str:
    """The innermost failure, on one line."""
    if isinstance(error, CheckpointException):
        _, (inner, _) = min(error.failures.items())
        return _reason(inner)
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
