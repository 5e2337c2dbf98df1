"""Hugging Face weights into a Megatron-Core model, or into a distributed checkpoint.

`load_hf_weights` fills an existing model. Each rank reads only slices that it owns, so no rank
holds the whole model, and data-parallel ranks, which own the same slices, share the reading.
`convert` loads in the same way and saves, so that the checkpoint holds exactly the weights that
training would start from.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_idpo.checkpoint.dtypes import check_floating, parse_dtype, stored_dtype
from megatron_idpo.checkpoint.model_directory import new_checkpoint
from megatron_idpo.checkpoint.weights import save_weights
from megatron_idpo.config.layout import Layout
from megatron_idpo.console.progress import show_spinner, track
from megatron_idpo.convert.families import (
    LEGACY_TENSORS,
    entry,
    expected_tensors,
    fused_experts,
    hf_shapes,
    weights_bytes,
)
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.tokenizer_files import CONFIG_FILE
from megatron_idpo.convert.slicing import Block, Shard
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel, ModelOptions, build_model, global_parameters
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.mcore.parallel.replicas import Replicas
from megatron_idpo.mcore.parallel.world import (
    distributed_world,
    is_rank0,
    raise_on_all_ranks,
    running_layout,
)
from megatron_idpo.storage.atomic import check_apart

_INPUT, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_BLOCK_BYTES = 32 << 20
"""Size of the blocks in which the two embeddings are compared."""

logger = logging.getLogger(__name__)


def open_hf(source: Path) -> tuple[HfCheckpoint, Architecture]:
    """Opens a Hugging Face checkpoint and checks its tensors against its architecture.

    Call it within `raise_on_all_ranks`: one of the checks runs on rank 0 only.

    Raises:
        UserError: an unreadable file, an unsupported architecture, a missing, unknown or wrong-
            shaped tensor, an output layer that differs from the embedding it is tied to, a
            tokenizer with more tokens than the vocabulary.
    """
    checkpoint = HfCheckpoint(source)
    architecture = read_architecture(checkpoint.config, source / CONFIG_FILE)
    if architecture.num_experts:
        checkpoint.split(fused_experts(architecture, checkpoint.names()))
    stored = checkpoint.names()
    checkpoint.check(expected_tensors(architecture, stored), LEGACY_TENSORS)
    # Also if another dtype is requested: integer codes cannot be cast to any.
    check_floating(str(source), {name: checkpoint.dtype(name) for name in hf_shapes(architecture)})
    checkpoint.check_vocabulary()
    if architecture.tied_embeddings and _OUTPUT in stored and is_rank0():
        _check_tied(checkpoint)
    return checkpoint, architecture


def read_architecture(config: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture of a parsed config.json; rank 0 logs keys that are not read.

    Raises:
        ConfigError: as `Architecture.from_hf`.
    """
    architecture = Architecture.from_hf(config, str(path))
    if architecture.unread_keys and is_rank0():
        logger.info("%s: %s", path, architecture.unread_note)
    return architecture


def hf_dtype(checkpoint: HfCheckpoint, architecture: Architecture) -> torch.dtype:
    """The dtype that the weights are stored in; see `stored_dtype`."""
    return stored_dtype(
        str(checkpoint.directory),
        {name: checkpoint.dtype(name) for name in hf_shapes(architecture)},
    )


def load_hf_weights(
    chunks: Sequence[GPTModel],
    checkpoint: HfCheckpoint,
    architecture: Architecture,
    *,
    show_progress: bool = False,
) -> None:
    """Fills every parameter of this rank from Hugging Face files, casting to the model's dtype.

    Collective: each data-parallel rank reads a part of their common slices, some rows of a tensor
    at a time, and broadcasts it to the others. Layouts and dtypes do not change the bits.

    Args:
        chunks: this rank's model chunks (`build_model`).
        checkpoint: result of `open_hf`.
        architecture: result of `open_hf`.
        show_progress: draw a progress bar.

    Raises:
        CheckpointError: a file is damaged, or a value too large for the model's dtype.
    """
    replicas = {is_expert: Replicas.running(is_expert=is_expert) for is_expert in (False, True)}
    parts: dict[bool, list[tuple[int, Block]]] = {}
    with raise_on_all_ranks("reading the weights"), torch.no_grad():
        checkpoint.verify(share=dist.get_rank(), shares=dist.get_world_size())
        for is_expert, blocks in _blocks(chunks, checkpoint, architecture).items():
            readers = replicas[is_expert].readers([block.num_bytes for block in blocks])
            parts[is_expert] = list(zip(readers, blocks, strict=True))
        own = [
            block
            for is_expert, shared in parts.items()
            for reader, block in shared
            if reader == replicas[is_expert].rank
        ]
        for block in track(own, "reading", total=len(own), unit="blocks", show=show_progress):
            block.read(checkpoint)
    for is_expert, shared in parts.items():
        replicas[is_expert].exchange((reader, block.target) for reader, block in shared)


def _blocks(
    chunks: Sequence[GPTModel], checkpoint: HfCheckpoint, architecture: Architecture
) -> dict[bool, list[Block]]:
    """What this rank's parameters consist of; those of experts separately."""
    rank = rank_coordinates()
    blocks: dict[bool, list[Block]] = {False: [], True: []}
    for name, parameter in global_parameters(chunks):
        tensors = entry(name, architecture)
        shard = Shard(*rank.tp(is_expert=tensors.is_expert))
        blocks[tensors.is_expert] += tensors.slicing.blocks(
            parameter, checkpoint, tensors.hf_names, architecture, shard
        )
    return blocks


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> None:
    """Converts a Hugging Face checkpoint into a Megatron-Core distributed checkpoint.

    Runs in one process, or in the processes of torchrun with the given layout. The target holds
    megatron-core's files and, in `huggingface/`, configuration and tokenizer for the way back.

    Args:
        source: directory with `config.json` and safetensors.
        target: directory to write; it appears only when it is complete.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the stored dtype.
        layout: how to split the work; every layout writes the same checkpoint.
        overwrite: replace an existing target.

    Raises:
        UserError: the source cannot be used or the target not written; nothing is left behind.
    """
    layout, start_s = layout or Layout(), time.monotonic()
    with distributed_world() as world:
        with raise_on_all_ranks("opening the checkpoint"):
            check_apart(source, target)
            checkpoint, architecture = open_hf(source)
            layout.check(architecture, world.size)
            target_dtype = parse_dtype(dtype) if dtype else hf_dtype(checkpoint, architecture)
        shapes = hf_shapes(architecture)
        with (
            running_layout(layout),
            new_checkpoint(
                target,
                checkpoint.companions,
                overwrite=overwrite,
                needed_bytes=weights_bytes(shapes, target_dtype),
            ) as directory,
        ):
            chunks = build_model(architecture, layout, ModelOptions(dtype=target_dtype))
            load_hf_weights(chunks, checkpoint, architecture, show_progress=world.is_first)
            with show_spinner("writing the checkpoint", show=world.is_first):
                save_weights(chunks, directory, location=target)
        if world.is_first:
            log_written(target, shapes, target_dtype, time.monotonic() - start_s)


def log_written(
    target: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seconds: float
) -> None:
    """Logs the result of a conversion: path, number of tensors, size, dtype, duration."""
    num_bytes = weights_bytes(shapes, dtype)
    size = f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
    name = str(dtype).removeprefix("torch.")
    logger.info(
        "wrote %s: %d tensors, %s of %s, in %.1f s", target, len(shapes), size, name, seconds
    )


def _check_tied(checkpoint: HfCheckpoint) -> None:
    """Checks that a stored output layer which is tied equals the embedding bit for bit."""
    num_rows = checkpoint.shape(_INPUT)[0]
    row_bytes = checkpoint.shape(_INPUT)[1] * checkpoint.dtype(_INPUT).itemsize
    block_rows = max(_BLOCK_BYTES // row_bytes, 1)
    equal = checkpoint.dtype(_INPUT) == checkpoint.dtype(_OUTPUT) and all(
        _same_bits(*(checkpoint.read(name, rows=rows) for name in (_INPUT, _OUTPUT)))
        for rows in (slice(row, row + block_rows) for row in range(0, num_rows, block_rows))
    )
    if not equal:
        raise CheckpointError.at(
            str(checkpoint.directory),
            f"tensor {_OUTPUT!r} differs from {_INPUT!r}, but config.json ties them",
            "if the output layer has its own weights, set tie_word_embeddings to false there",
        )


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    # As bytes: NaN equals NaN, and -0.0 differs from 0.0.
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
