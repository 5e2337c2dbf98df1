"""A model's weights as a megatron-core `torch_dist` checkpoint, independent of the layout.

Saving and loading use the parameters' own memory, one tensor at a time. megatron-core stores
SwiGLU's fused weight as two tensors, so that any tensor parallelism can read it. Its own code
copies all such weights at once in both directions, which adds half the size of the model to the
peak memory. Here the halves are views.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

from megatron_idpo.checkpoint.contents import contents_if_recorded, write_contents
from megatron_idpo.checkpoint.dcp_io import DirectSave
from megatron_idpo.checkpoint.dcp_planner import read_chunks_together
from megatron_idpo.checkpoint.stored_weights import check_same_model
from megatron_idpo.checkpoint.tensor_chunks import TensorChunk, sharded_entries
from megatron_idpo.mcore.lora.chunk import ADAPTERS_NAME
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.parallel.replicas import Replicas
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    is_rank0,
    raise_on_all_ranks,
    read_on_rank0,
)

ShardedState = dict[str, Any]

_EXPERTS = ".experts."
"""In the keys of weights that are split over expert-parallel ranks; shared experts are not."""


def sharded_weights(chunks: Sequence[GPTModel], *, extra_state: bool = False) -> ShardedState:
    """This rank's part of a checkpoint of the model's weights, without adapters.

    The values are megatron-core's sharded tensors, whose keys and offsets are global; the
    dictionary's own keys only distinguish this rank's chunks. Factories are applied, so every value
    is a view of a parameter.

    Args:
        chunks: this rank's model chunks.
        extra_state: include the modules' `_extra_state` (Transformer Engine's FP8 scales, otherwise
            empty). It is not a weight, but other readers of the checkpoint require it.
    """
    state: ShardedState = {}
    for index, chunk in enumerate(chunks):
        for key, value in chunk.sharded_state_dict().items():
            if key.startswith(f"{ADAPTERS_NAME}."):
                continue
            if extra_state or not isinstance(value, ShardedObject):
                state[f"chunk{index}.{key}"] = value
    apply_factories(state)
    return state


def save_weights(
    chunks: Sequence[GPTModel], directory: Path, *, location: Path | None = None
) -> None:
    """Writes the weights of all ranks into an empty directory. Collective.

    Args:
        chunks: this rank's model chunks.
        directory: exists and is empty, the same on every rank.
        location: its name in errors, if it has a temporary name.

    Raises:
        CheckpointError: on every rank, if any of them could not write a file.
    """
    strategy = DirectSave(location or directory)
    state = sharded_weights(chunks, extra_state=True)
    _share_writing(state)
    with suppress_megatron_warnings():
        dist_checkpointing.save(state, str(directory), strategy)
    with raise_on_all_ranks("writing the checksums"):
        if is_rank0():
            write_contents(directory, strategy.pieces)


def _share_writing(state: ShardedState) -> None:
    """Makes each data-parallel rank the writer of a part of the tensors that all of them hold.

    megatron-core writes the replica whose numbers are all 0; the last one counts data-parallel
    ranks. Without this, one rank would write all weights of an 8B model on 512 GPUs.
    """
    for is_expert in (False, True):
        replicas = Replicas.running(is_expert=is_expert)
        tensors = [
            entry for entry in sharded_entries(state) if (_EXPERTS in entry.key) == is_expert
        ]
        # Copies of a shared weight on other stages are not written.
        sizes_bytes = [0 if any(entry.replica_id[:-1]) else entry.data.nbytes for entry in tensors]
        writers = replicas.readers(sizes_bytes)
        for entry, writer in zip(tensors, writers, strict=True):
            *others, replica = entry.replica_id
            assert replica == replicas.rank, f"{entry.key}: replica {entry.replica_id}"
            entry.replica_id = (*others, (replica - writer) % replicas.size)


def load_weights(chunks: Sequence[GPTModel], directory: Path, architecture: Architecture) -> None:
    """Fills every parameter from a checkpoint of any layout, casting to the model's dtype.

    Collective: data-parallel ranks share the reading; a failure on any rank is raised on all.

    Args:
        chunks: this rank's model chunks.
        directory: the checkpoint.
        architecture: of the model.

    Raises:
        CheckpointError: there is no such checkpoint, a missing, unknown or wrong-shaped weight, a
            file that is missing, truncated or damaged.
    """
    tensor_chunks = [TensorChunk.of(entry) for entry in sharded_entries(sharded_weights(chunks))]
    local = {chunk.key: chunk.global_shape for chunk in tensor_chunks}
    # A rank knows only its own pipeline stage's weights; the check needs those of the whole model.
    shapes = {key: shape for rank in all_gather_objects(local) for key, shape in rank.items()}
    contents, metadata = read_on_rank0(
        "loading the weights",
        lambda: (
            contents_if_recorded(directory),
            check_same_model(directory, shapes, architecture.vocab_size, architecture.num_kv_heads),
        ),
    )
    replicas = {is_expert: Replicas.running(is_expert=is_expert) for is_expert in (False, True)}
    shared = [(chunk, replicas[_EXPERTS in chunk.key]) for chunk in tensor_chunks]
    with suppress_megatron_warnings():
        read_chunks_together(shared, directory, contents, metadata)
