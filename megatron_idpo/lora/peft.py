"""Adapters to and from PEFT's files, in any parallel layout.

    save_peft(adapters, architecture, Path("adapter"), base_model="meta-llama/Llama-3.1-8B")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(...), "adapter")

Every projection has an A and a B of its own here as in PEFT, so values are only moved.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from megatron_idpo.checkpoint.dtype_checks import check_floating, check_range
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.convert.hf_io.distributed_writer import write_together
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.safetensors_file import TensorSpec
from megatron_idpo.convert.hf_io.writer import HfWriter
from megatron_idpo.convert.slicing import Shard
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.adapters import Adapters
from megatron_idpo.lora.names import adapter_shape, peft_name
from megatron_idpo.lora.peft_config import (
    CONFIG_NAME,
    check_same_settings,
    peft_config,
    read_peft_settings,
)
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, rank_coordinates
from megatron_idpo.mcore.parallel.world import broadcast_from_rank0, raise_on_all_ranks

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"


def save_peft(
    adapters: Adapters, architecture: Architecture, directory: Path, base_model: str
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`. Collective.

    The first data-parallel replica does the work, one tensor at a time, each pipeline stage its own
    layers. The values are in the adapters' own format.

    Args:
        adapters: of this rank's chunks.
        architecture: what they are.
        directory: appears only when it is complete; an adapter that is there is replaced.
        base_model: where PEFT finds the base model, a directory or a name on the hub.

    Raises:
        CheckpointError: on every rank; it cannot be written, and nothing is left behind.
    """
    shapes = peft_shapes(adapters.settings, architecture)
    dtype = broadcast_from_rank0(lambda: next(adapters.parameters())[1].dtype)
    config = peft_config(adapters.settings, base_model)

    def add_config(incomplete: Path) -> None:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (incomplete / CONFIG_NAME).write_text(text, encoding="utf-8")

    writer = HfWriter(
        directory,
        [TensorSpec(name, shape, dtype) for name, shape in shapes.items()],
        token=broadcast_from_rank0(lambda: uuid4().hex[:8]),
        single_file=WEIGHTS_NAME,
        max_shard_bytes=sys.maxsize,
        overwrite=True,
    )
    write_together(writer, whole_adapter_tensors(adapters), add_config)


def load_peft(adapters: Adapters, architecture: Architecture, directory: Path) -> None:
    """Fill the adapters with what PEFT or `save_peft` saved, casting to their format.

    Collective only in that a failure on any rank is raised on all; each rank reads its own slices.

    Args:
        adapters: of this rank's chunks.
        architecture: what they are.
        directory: with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        CheckpointError: other rank, scale or targets than the adapters', an option that we do not
            have, a missing, unknown or wrong-shaped tensor, a damaged file.
    """
    rank = rank_coordinates()
    shard = Shard(rank.tp_rank, rank.tp_size)
    with raise_on_all_ranks("reading the adapter"), torch.no_grad():
        found = read_peft_settings(directory)
        check_same_settings(found, adapters.settings, directory / CONFIG_NAME)
        stored = _open(directory)
        stored.check(peft_shapes(adapters.settings, architecture))
        check_floating(str(directory), {name: stored.dtype(name) for name in stored.names()})
        for one in adapters.tensors():
            name = peft_name(one.layer, one.projection, one.side)
            sizes = stored.shape(name)
            cut = [shard.of(size) if n == one.split_dim else None for n, size in enumerate(sizes)]
            one.parameter.copy_(stored.read(name, *cut))
            check_range(str(directory), name, one.parameter, stored.dtype(name))


def peft_shapes(settings: LoraConfig, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Every tensor of an adapter by PEFT's name, in the order of the layers."""
    return {
        peft_name(layer, target, side): adapter_shape(target, side, settings.rank, architecture)
        for layer in range(architecture.num_layers)
        for target in settings.projections
        for side in ("A", "B")
    }


def whole_adapter_tensors(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """This stage's tensors under PEFT's names, on its first replica's first tensor-parallel rank.

    They are whole, one at a time, in the adapters' own format.

    Collective over the first replica's tensor-parallel groups: a gather for every split tensor.
    """
    rank = rank_coordinates()
    if rank.dp_rank > 0:
        return
    for one in adapters.tensors():
        tensor = one.parameter.detach()
        shards = [tensor] if one.split_dim is None else gather_tensor_shards(tensor)
        if rank.tp_rank == 0:
            assert shards is not None
            whole = torch.cat(shards, one.split_dim) if one.split_dim is not None else tensor
            yield peft_name(one.layer, one.projection, one.side), whole


def _open(directory: Path) -> HfCheckpoint:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        message, remedy = "does not exist", "name the directory that PEFT's save_pretrained wrote"
        if (directory / _PICKLE_NAME).is_file():
            message = f"does not exist, only {_PICKLE_NAME}, which could run any code when loaded"
            remedy = "where you trust the file, load it by PEFT and save it again"
        raise CheckpointError.at(str(path), message, remedy)
    return HfCheckpoint(directory, single_file=WEIGHTS_NAME)
