"""Megatron-Core weights to Hugging Face: sharded safetensors, configuration, tokenizer.

`whole_tensors` gathers the tensor-parallel shards of one parameter at a time. Each pipeline stage
writes its own tensors at positions that are planned before the first byte is written, so every rank
holds at most one whole tensor and the stages write concurrently.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from megatron_idpo.checkpoint.dtypes import check_floating, parse_dtype, stored_dtype
from megatron_idpo.checkpoint.model_directory import copy_companions
from megatron_idpo.checkpoint.snapshot_metadata import whole_snapshot
from megatron_idpo.checkpoint.stored_weights import stored_weights
from megatron_idpo.checkpoint.weights import load_weights
from megatron_idpo.config.layout import Layout
from megatron_idpo.console.progress import show_spinner, track
from megatron_idpo.convert.families import entry, hf_shapes
from megatron_idpo.convert.hf_io.safetensors_file import TensorSpec
from megatron_idpo.convert.hf_io.tokenizer_files import CONFIG_FILE, read_json_object
from megatron_idpo.convert.hf_io.writer import HfWriter, write_together
from megatron_idpo.convert.hf_to_megatron import log_written
from megatron_idpo.convert.model_source import check_snapshot, open_companions
from megatron_idpo.convert.slicing import Replicated
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel, ModelOptions, build_model, global_parameters
from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, rank_coordinates
from megatron_idpo.mcore.parallel.world import (
    broadcast_from_rank0,
    distributed_world,
    raise_on_all_ranks,
    running_layout,
)
from megatron_idpo.storage.atomic import check_apart

ParameterValue = Callable[[torch.nn.Parameter], Tensor]
"""What to export of a parameter: its data, its gradient, its data with adapters merged in."""


def stored_value(parameter: torch.nn.Parameter) -> Tensor:
    """The parameter's data."""
    return parameter.data


def whole_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    value: ParameterValue = stored_value,
    *,
    every_replica: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's whole tensors under Hugging Face names, one parameter at a time.

    Collective over the tensor-parallel group of each parameter: one gather to its first rank per
    split parameter; forward only. That rank yields the tensors. The others yield nothing, but must
    iterate to the end too, or it hangs in the next gather. A tied output layer is yielded by the
    first stage, as the embedding. A yielded tensor may be a view of the parameter: clone it to keep
    it.

    Args:
        chunks: this rank's model chunks.
        architecture: of the model.
        value: what to yield of a parameter.
        every_replica: False: of the copies of a parameter on data-parallel ranks, one is yielded.
            With expert parallelism those of the experts are not all on the same rank.
    """
    rank = rank_coordinates()
    for name, parameter in global_parameters(chunks):
        if _is_tied_output(name, architecture):
            continue
        tensors = entry(name, architecture)
        is_expert = tensors.is_expert
        if not every_replica and rank.replica(is_expert=is_expert) > 0:
            continue
        local, tp_rank = value(parameter), rank.tp(is_expert=is_expert)[0]
        is_replicated = isinstance(tensors.slicing, Replicated)
        shards = [local] if is_replicated else gather_tensor_shards(local, is_expert=is_expert)
        if tp_rank == 0:
            assert shards is not None
            merged = tensors.slicing.merge(shards, architecture)
            yield from zip(tensors.hf_names, merged, strict=True)


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
    checksums: bool = False,
) -> None:
    """Writes a model as a Hugging Face directory, from any layout. Collective.

    The first data-parallel replica does the work: on each of its pipeline stages, the first tensor-
    parallel rank writes the stage's tensors. Vocabulary padding is removed.

    Args:
        chunks: this rank's model chunks.
        architecture: of the model.
        companions: `config.json`, generation config and tokenizer files to copy.
        target: directory to write; it appears only when it is complete.
        dtype: the dtype to store; written into `config.json` too.
        overwrite: replace an existing export.
        show_progress: draw a progress bar of this stage's tensors.
        value: what to write of a parameter (`lora.adapters.merged_value`); None writes its data.
        checksums: store the checksum of each tensor in the headers. Conversions do not, so that a
            model that is converted and back has the same bytes.

    Raises:
        CheckpointError: the target cannot be written; nothing is left behind.
    """
    specs = [TensorSpec(name, shape, dtype) for name, shape in hf_shapes(architecture).items()]
    token = broadcast_from_rank0(lambda: uuid4().hex[:8])

    def add_companions(incomplete: Path) -> None:
        copy_companions(companions, incomplete)
        _set_config_dtype(incomplete / CONFIG_FILE, dtype)

    tensors = _stage_tensors(chunks, architecture, value or stored_value, dtype, show_progress)
    writer = HfWriter(target, specs, token=token, checksums=checksums, overwrite=overwrite)
    write_together(writer, tensors, add_companions)


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> None:
    """Converts a Megatron-Core checkpoint of this package into a Hugging Face directory.

    Runs in one process, or in the processes of torchrun with the given layout, which may differ
    from the layout that the checkpoint was saved in.

    Args:
        source: output of `convert hf-to-megatron`, with its `huggingface/`; or a snapshot of an
            sDPO step, every byte of which is checked.
        target: directory to write; it appears only when it is complete.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the stored dtype.
        layout: how to split the work.
        overwrite: replace an existing export.

    Raises:
        UserError: the source cannot be read or the target not written; nothing is left behind.
    """
    layout, start_s = layout or Layout(), time.monotonic()
    with distributed_world() as world:
        with raise_on_all_ranks("opening the checkpoint"):
            check_apart(source, target)
            snapshot = whole_snapshot(source)
            companions, architecture = open_companions(source)
            layout.check(architecture, world.size)
            stored = {key: weight.dtype for key, weight in stored_weights(source).items()}
            check_floating(str(source), stored)
            target_dtype = parse_dtype(dtype) if dtype else stored_dtype(str(source), stored)
        if snapshot is not None:
            check_snapshot(source, snapshot)
        with running_layout(layout):
            chunks = build_model(architecture, layout, ModelOptions(dtype=target_dtype))
            with show_spinner("reading the checkpoint", show=world.is_first):
                load_weights(chunks, source, architecture)
            export_hf(
                chunks,
                architecture,
                companions,
                target,
                dtype=target_dtype,
                overwrite=overwrite,
                show_progress=world.is_first,
            )
        if world.is_first:
            seconds = time.monotonic() - start_s
            log_written(target, hf_shapes(architecture), target_dtype, seconds)


def _stage_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    value: ParameterValue,
    dtype: torch.dtype,
    show_progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank writes."""
    tensors = whole_tensors(chunks, architecture, value, every_replica=False)
    total = sum(
        len(entry(name, architecture).hf_names)
        for name, _ in global_parameters(chunks)
        if not _is_tied_output(name, architecture)
    )
    for name, tensor in track(tensors, "writing", total=total, unit="tensors", show=show_progress):
        yield name, tensor.to(dtype)


def _is_tied_output(name: str, architecture: Architecture) -> bool:
    """Whether this is the last stage's copy of the embedding, which the first stage exports."""
    return name == "output_layer.weight" and architecture.tied_embeddings


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Sets the dtype in `config.json`; does not touch a file that already says so."""
    config = read_json_object(path)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != name for key in keys):
        config |= dict.fromkeys(keys, name)
        path.write_text(json.dumps(config, indent=2) + "\n")
