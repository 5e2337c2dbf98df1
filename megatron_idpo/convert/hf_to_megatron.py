"""Hugging Face weights into a live Megatron-Core model, or into a distributed checkpoint.

`load_hf_weights` fills a model that is already there, each rank reading only the slices it owns: no
rank ever holds the whole model, and nothing is sent between ranks. `convert` is the same followed
by a save, so that what it writes is exactly what training would have started from.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_idpo.checkpoint.directory import new_checkpoint
from megatron_idpo.checkpoint.weights import save_weights
from megatron_idpo.convert.dtypes import parse_dtype, stored_dtype
from megatron_idpo.convert.families import entry, hf_shapes
from megatron_idpo.convert.hf_reader import HfCheckpoint
from megatron_idpo.convert.progress import tensor_progress
from megatron_idpo.convert.slicing import Shard
from megatron_idpo.mcore.architecture import Architecture
from megatron_idpo.mcore.groups import this_place
from megatron_idpo.mcore.layout import Layout
from megatron_idpo.mcore.model import GPTModel, ModelOptions, build_model, global_parameters
from megatron_idpo.mcore.world import agreeing, joined_world, running


def open_hf(source: Path) -> tuple[HfCheckpoint, Architecture]:
    """A Hugging Face checkpoint and the architecture it holds, both checked against each other.

    Raises:
        UserError: an unreadable file, an unsupported architecture, a missing, unknown or wrong-
            shaped tensor, a tokenizer with more tokens than the vocabulary.
    """
    checkpoint = HfCheckpoint(source)
    architecture = Architecture.from_hf(checkpoint.config)
    checkpoint.check(hf_shapes(architecture))
    checkpoint.check_vocabulary()
    return checkpoint, architecture


def hf_dtype(checkpoint: HfCheckpoint) -> torch.dtype:
    """The number format that the checkpoint is stored in; see `stored_dtype`."""
    return stored_dtype(
        str(checkpoint.directory), {name: checkpoint.dtype(name) for name in checkpoint.names()}
    )


def load_hf_weights(
    chunks: Sequence[GPTModel],
    checkpoint: HfCheckpoint,
    architecture: Architecture,
    *,
    show_progress: bool = False,
) -> None:
    """Fill every parameter of this rank from Hugging Face files, casting to the model's format.

    Collective only in that a failure on any rank is raised on all. Reads this rank's slices, one
    tensor at a time.

    Args:
        chunks: this rank's model chunks (`build_model`).
        checkpoint: what `open_hf` returned.
        architecture: likewise.
        show_progress: draw a progress bar.

    Raises:
        CheckpointError: a file is damaged.
    """
    place = this_place()
    shard = Shard(place.tensor, place.tensor_size)
    parameters = list(global_parameters(chunks))
    with agreeing("reading the weights"), torch.no_grad():
        for name, parameter in tensor_progress("loading", parameters, show=show_progress):
            line = entry(name, architecture)
            parameter.copy_(line.slicing.read(checkpoint, line.hf_names, architecture, shard))


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
    layout = layout or Layout()
    with joined_world() as world:
        with agreeing("opening the checkpoint"):
            checkpoint, architecture = open_hf(source)
            layout.check(architecture, world.size)
            options = ModelOptions(dtype=parse_dtype(dtype) if dtype else hf_dtype(checkpoint))
        with (
            running(layout),
            new_checkpoint(target, checkpoint.companions, overwrite=overwrite) as directory,
        ):
            chunks = build_model(architecture, layout, options)
            load_hf_weights(chunks, checkpoint, architecture, show_progress=world.is_first)
            save_weights(chunks, directory, release=True)
