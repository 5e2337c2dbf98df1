"""A model's weights as a megatron-core `torch_dist` checkpoint, independent of the layout.

Saving and loading happen in the parameters' own memory. megatron-core keeps SwiGLU's fused weight
as two tensors in a checkpoint, so that any tensor parallelism can read it; left to itself it copies
every such weight at once, in both directions, which is half as much again as the model. Here the
halves are views when loading, and when the caller gives the model up while saving (`release`) each
fused weight is freed as its halves are made.

Not here: optimizer state, schedules, atomic directories (`checkpoint/directory.py`).
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.model import GPTModel

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""What the keys of weights start with, against those of optimizer state."""

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


def save_weights(chunks: Sequence[GPTModel], directory: Path, *, release: bool = False) -> None:
    """Write the weights of all ranks into an empty directory. Collective.

    Args:
        chunks: this rank's model chunks.
        directory: exists and is empty, the same on every rank.
        release: give up the model: its parameters are emptied as they are prepared for writing,
            so that the peak stays at the model's own size plus one tensor.

    Raises:
        CheckpointError: a file could not be written.
    """
    state = sharded_weights(chunks)
    if release:
        _take_over(chunks, state)
    try:
        with quiet_checkpointing():
            dist_checkpointing.save(state, str(directory), async_strategy="mcore")
    except (OSError, CheckpointingException, RuntimeError) as error:
        raise CheckpointError.at(
            str(directory), f"the weights could not be saved ({error})", "check space and rights"
        ) from error


def load_weights(chunks: Sequence[GPTModel], directory: Path) -> None:
    """Fill every parameter from a checkpoint saved in any layout. Collective.

    Raises:
        CheckpointError: no such checkpoint, a missing or wrong-shaped tensor, an unreadable file.
    """
    with _readable(directory):
        dist_checkpointing.load(
            sharded_weights(chunks), str(directory), strict=StrictHandling.RAISE_UNEXPECTED
        )


def weight_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """The number format of every weight that a checkpoint holds, by its megatron-core key.

    Raises:
        CheckpointError: no such checkpoint.
    """
    with _readable(directory):
        found = dist_checkpointing.load_tensors_metadata(str(directory))
    return {key: value.dtype for key, value in found.items() if key.startswith(_MODEL_KEYS)}


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """megatron-core's and torch's ways to say that a checkpoint is no good, told to the user."""
    if not (directory / "metadata.json").is_file():
        raise CheckpointError.at(
            str(directory),
            "not a Megatron-Core checkpoint (no metadata.json)",
            "give the directory that `convert hf-to-megatron` wrote",
        )
    try:
        with quiet_checkpointing():
            yield
    except (OSError, CheckpointingException, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError.at(
            str(directory),
            f"cannot be loaded ({_first_line(error)})",
            "it may be damaged, incomplete or of another architecture",
        ) from error


@contextmanager
def quiet_checkpointing() -> Iterator[None]:
    """Without what megatron-core 0.19 and torch say about each other's deprecations on the way."""
    with warnings.catch_warnings():
        for message in (
            "Please use DTensor instead",
            "torch.distributed is disabled",
            "The argument order of load",
        ):
            warnings.filterwarnings("ignore", message)
        yield


def _take_over(chunks: Sequence[GPTModel], state: ShardedState) -> None:
    """Move what is to be saved out of the parameters, emptying each as soon as it is copied.

    The writer would otherwise clone every view of a larger tensor, all before the first byte is
    written (`FileSystemWriterAsync.prepare_write_data`).
    """
    owners = {
        parameter.untyped_storage().data_ptr(): parameter
        for chunk in chunks
        for parameter in chunk.parameters()
    }
    for value in _sharded_tensors(state.values()):
        storage = value.data.untyped_storage()
        if value.data.nbytes < storage.nbytes():
            value.data = value.data.detach().clone()
            owner = owners[storage.data_ptr()]
            owner.data = torch.empty(0, dtype=owner.dtype, device=owner.device)


def _sharded_tensors(values: Iterable[Any]) -> Iterator[ShardedTensor]:
    """The sharded tensors among nested values."""
    for value in values:
        if isinstance(value, dict):
            yield from _sharded_tensors(value.values())
        elif isinstance(value, list):
            yield from _sharded_tensors(value)
        elif isinstance(value, ShardedTensor):
            yield value


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
