"""Megatron-Core weights back to Hugging Face: sharded safetensors, configuration, tokenizer.

`whole_tensors` puts the tensor-parallel shards of one parameter together at a time; each pipeline
stage writes its own tensors into files whose places were laid out before the first byte, so memory
stays bounded by one tensor on every rank and stages write side by side.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from megatron_idpo.checkpoint.dtype_checks import check_floating
from megatron_idpo.checkpoint.model_directory import COMPANIONS, companion_files, copy_companions
from megatron_idpo.checkpoint.snapshot_metadata import whole_snapshot
from megatron_idpo.checkpoint.stored_weights import stored_weights
from megatron_idpo.checkpoint.weights import load_weights
from megatron_idpo.convert.families import entry, hf_shapes
from megatron_idpo.convert.hf_io.distributed_writer import write_together
from megatron_idpo.convert.hf_io.dtypes import parse_dtype, stored_dtype
from megatron_idpo.convert.hf_io.safetensors_header import TensorSpec
from megatron_idpo.convert.hf_io.tokenizer_files import (
    CONFIG_FILE,
    check_vocabulary,
    read_json_object,
)
from megatron_idpo.convert.hf_io.writer import HfWriter
from megatron_idpo.convert.model_source import check_snapshot
from megatron_idpo.convert.progress import busy, report_written, tensor_progress
from megatron_idpo.convert.slicing import Replicated
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel, ModelOptions, build_model, global_parameters
from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, this_rank
from megatron_idpo.mcore.parallel.layout import Layout
from megatron_idpo.mcore.parallel.world import (
    from_first,
    joined_world,
    raise_on_all_ranks,
    running,
)
from megatron_idpo.storage.directories import check_apart

ParameterValue = Callable[[torch.nn.Parameter], Tensor]
"""What to take of a parameter: its data, its gradient, its data with adapters merged in."""


def stored_value(parameter: torch.nn.Parameter) -> Tensor:
    """The parameter's data."""
    return parameter.data


def whole_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    value: ParameterValue = stored_value,
) -> Iterator[tuple[str, Tensor]]:
    """This stage's tensors under their Hugging Face names, whole, one parameter at a time.

    Collective over the tensor-parallel group: a gather to its first rank for every parameter that
    is split; forward only. The first rank yields the tensors, the others yield nothing, and all
    have to run through to the end. A tied output layer is the first stage's to yield. What is
    yielded may be a view of the parameter: clone it to keep it.
    """
    is_first = this_rank().tensor == 0
    for name, parameter in global_parameters(chunks):
        if _is_tied_output(name, architecture):
            continue
        line = entry(name, architecture)
        replicated = isinstance(line.slicing, Replicated)
        mine = value(parameter)
        shards = [mine] if replicated else gather_tensor_shards(mine)
        if is_first:
            assert shards is not None
            merged = line.slicing.merge(shards, architecture)
            yield from zip(line.hf_names, merged, strict=True)


def export_hf(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    companions: Sequence[Path],
    target: Path,
    *,
    dtype: torch.dtype,
    overwrite: bool = False,
    show_progress: bool = False,
    value: ParameterValue | None = None,
) -> None:
    """Write a live model as a Hugging Face directory, in any layout. Collective.

    The first data-parallel replica does the work: on each of its pipeline stages the first tensor-
    parallel rank writes that stage's tensors. Vocabulary padding is left out.

    Args:
        chunks: this rank's model chunks.
        architecture: what they are.
        companions: `config.json`, generation config and tokenizer files to go along.
        target: directory to write; it appears only when it is complete.
        dtype: the format to store; `config.json` is made to say so.
        overwrite: replace an existing export.
        show_progress: draw a progress bar, over this stage's tensors.
        value: what to write of a parameter (`lora.merge.merged_value`); None is its data.

    Raises:
        CheckpointError: the target cannot be written; nothing is left behind.
    """
    specs = [TensorSpec(name, shape, dtype) for name, shape in hf_shapes(architecture).items()]
    token = from_first(lambda: uuid4().hex[:8])

    def add_companions(incomplete: Path) -> None:
        copy_companions(companions, incomplete)
        _set_config_dtype(incomplete / CONFIG_FILE, dtype)

    tensors = _stage_tensors(chunks, architecture, value or stored_value, dtype, show_progress)
    writer = HfWriter(target, specs, token=token, overwrite=overwrite)
    write_together(writer, tensors, add_companions)


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a Megatron-Core checkpoint of ours into a Hugging Face directory.

    Runs in one process, or in the processes of a torchrun with the given layout, which need not be
    the one that the checkpoint was saved in.

    Args:
        source: what `convert hf-to-megatron` wrote, with its `huggingface/`; or a snapshot, every
            byte of which is checked.
        target: directory to write; it appears only when it is complete.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the stored format.
        layout: how to split the work.
        overwrite: replace an existing export.

    Raises:
        UserError: the source cannot be read or the target not written; nothing is left behind.
    """
    layout, begin_s = layout or Layout(), time.monotonic()
    with joined_world() as world:
        with raise_on_all_ranks("opening the checkpoint"):
            check_apart(source, target)
            snapshot = whole_snapshot(source)
            companions = companion_files(source)
            path = source / COMPANIONS / CONFIG_FILE
            architecture = Architecture.from_hf(read_json_object(path), str(path))
            layout.check(architecture, world.size)
            check_vocabulary(source / COMPANIONS, architecture.vocab_size)
            stored = {key: weight.dtype for key, weight in stored_weights(source).items()}
            check_floating(str(source), stored)
            wanted = parse_dtype(dtype) if dtype else stored_dtype(str(source), stored)
        if snapshot is not None:
            check_snapshot(source, snapshot)
        with running(layout):
            chunks = build_model(architecture, layout, ModelOptions(dtype=wanted))
            with busy("reading the checkpoint", show=world.is_first):
                load_weights(chunks, source, architecture)
            export_hf(
                chunks,
                architecture,
                companions,
                target,
                dtype=wanted,
                overwrite=overwrite,
                show_progress=world.is_first,
            )
        if world.is_first:
            seconds = time.monotonic() - begin_s
            report_written(target, hf_shapes(architecture), wanted, seconds)


def _stage_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    value: ParameterValue,
    dtype: torch.dtype,
    show_progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes; nothing but on the first replica, which gathers as it goes."""
    if this_rank().data > 0:
        return
    tensors = whole_tensors(chunks, architecture, value)
    total = sum(
        len(entry(name, architecture).hf_names)
        for name, _ in global_parameters(chunks)
        if not _is_tied_output(name, architecture)
    )
    for name, tensor in tensor_progress("writing", tensors, total=total, show=show_progress):
        yield name, tensor.to(dtype)


def _is_tied_output(name: str, architecture: Architecture) -> bool:
    """Whether this is a last stage's copy of the embedding, which the first stage exports."""
    return name == "output_layer.weight" and architecture.tied_embeddings


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let `config.json` name the format that was written; untouched where it already does."""
    config = read_json_object(path)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != name for key in keys):
        config |= dict.fromkeys(keys, name)
        path.write_text(json.dumps(config, indent=2) + "\n")
