"""Hugging Face weights into a live Megatron-Core model, or into a distributed checkpoint.

`load_hf_weights` fills a model that is already there, each rank reading only the slices it owns: no
rank ever holds the whole model, and nothing is sent between ranks. `convert` is the same followed
by a save, so that what it writes is exactly what training would have started from.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_idpo.checkpoint.dtype_checks import check_floating
from megatron_idpo.checkpoint.model_directory import new_checkpoint
from megatron_idpo.checkpoint.weights import save_weights
from megatron_idpo.convert.families import (
    LEGACY_TENSORS,
    entry,
    expected_tensors,
    hf_shapes,
)
from megatron_idpo.convert.hf_io.dtypes import parse_dtype, stored_dtype
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.tokenizer_files import CONFIG_FILE
from megatron_idpo.convert.progress import (
    busy,
    report_written,
    tensor_progress,
    weights_bytes,
)
from megatron_idpo.convert.slicing import Shard
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel, ModelOptions, build_model, global_parameters
from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.mcore.parallel.layout import Layout
from megatron_idpo.mcore.parallel.world import (
    is_first_rank,
    joined_world,
    raise_on_all_ranks,
    running,
)
from megatron_idpo.storage.directories import check_apart

_INPUT, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_BLOCK_BYTES = 32 << 20  # of the two embeddings, while they are compared


def open_hf(source: Path) -> tuple[HfCheckpoint, Architecture]:
    """A Hugging Face checkpoint and the architecture it holds, both checked against each other.

    What only one rank needs to look at, the first does, so call it within `raise_on_all_ranks`.

    Raises:
        UserError: an unreadable file, an unsupported architecture, a missing, unknown or wrong-
            shaped tensor, an output layer that is not the embedding it is said to be tied to, a
            tokenizer with more tokens than the vocabulary.
    """
    checkpoint = HfCheckpoint(source)
    architecture = Architecture.from_hf(checkpoint.config, str(source / CONFIG_FILE))
    stored = checkpoint.names()
    checkpoint.check(expected_tensors(architecture, stored), LEGACY_TENSORS)
    # Also where another format is asked for: this is not a matter of choosing one.
    check_floating(str(source), {name: checkpoint.dtype(name) for name in hf_shapes(architecture)})
    checkpoint.check_vocabulary()
    if architecture.tied_embeddings and _OUTPUT in stored and is_first_rank():
        _check_tied(checkpoint)
    return checkpoint, architecture


def hf_dtype(checkpoint: HfCheckpoint, architecture: Architecture) -> torch.dtype:
    """The number format that the weights are stored in; see `stored_dtype`."""
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
    """Fill every parameter of this rank from Hugging Face files, casting to the model's format.

    Collective only in that a failure on any rank is raised on all. Reads this rank's slices, some
    rows of a tensor at a time.

    Args:
        chunks: this rank's model chunks (`build_model`).
        checkpoint: what `open_hf` returned.
        architecture: likewise.
        show_progress: draw a progress bar.

    Raises:
        CheckpointError: a file is damaged, or a value too large for the model's format.
    """
    rank = this_rank()
    shard = Shard(rank.tensor, rank.tensor_size)
    parameters = list(global_parameters(chunks))
    with raise_on_all_ranks("reading the weights"), torch.no_grad():
        for name, parameter in tensor_progress(
            "reading", parameters, total=len(parameters), show=show_progress
        ):
            line = entry(name, architecture)
            line.slicing.fill(parameter, checkpoint, line.hf_names, architecture, shard)


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face checkpoint into a Megatron-Core distributed checkpoint.

    Runs in one process, or in the processes of a torchrun with the given layout. The target holds
    megatron-core's files and, in `huggingface/`, the configuration and tokenizer for the way back.

    Args:
        source: directory with `config.json` and safetensors.
        target: directory to write; it appears only when it is complete.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the stored format.
        layout: how to split the work; every layout writes the same checkpoint.
        overwrite: replace an existing target.

    Raises:
        UserError: the source cannot be used or the target not written; nothing is left behind.
    """
    layout, begin_s = layout or Layout(), time.monotonic()
    with joined_world() as world:
        with raise_on_all_ranks("opening the checkpoint"):
            check_apart(source, target)
            checkpoint, architecture = open_hf(source)
            layout.check(architecture, world.size)
            stored = parse_dtype(dtype) if dtype else hf_dtype(checkpoint, architecture)
        shapes = hf_shapes(architecture)
        with (
            running(layout),
            new_checkpoint(
                target,
                checkpoint.companions,
                overwrite=overwrite,
                needed_bytes=weights_bytes(shapes, stored),
            ) as directory,
        ):
            chunks = build_model(architecture, layout, ModelOptions(dtype=stored))
            load_hf_weights(chunks, checkpoint, architecture, show_progress=world.is_first)
            with busy("writing the checkpoint", show=world.is_first):
                save_weights(chunks, directory, location=target)
        if world.is_first:
            report_written(target, shapes, stored, time.monotonic() - begin_s)


def _check_tied(checkpoint: HfCheckpoint) -> None:
    """An output layer that is stored though it is tied has to be the embedding, to the bit."""
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
            "if the output layer is its own, say tie_word_embeddings: false there",
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
