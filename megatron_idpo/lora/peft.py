"""LoRA adapters in PEFT's file format, from and to any parallel layout.

    save_peft(adapters, architecture, Path("adapter"), base_model="meta-llama/Llama-3.1-8B")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(...), "adapter")

Every projection has its own A and B here as in PEFT, so values are moved without arithmetic.
`fused_modules.py`: where Hugging Face's modules fuse projections. `adapter_config.py`: settings.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.checkpoint.dtypes import check_floating, check_range
from megatron_idpo.checkpoint.model_directory import copy_companions
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.safetensors_file import TensorSpec
from megatron_idpo.convert.hf_io.writer import HfWriter, write_together
from megatron_idpo.convert.slicing import Shard
from megatron_idpo.lora.adapter_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_same_adapter,
    open_adapter,
    peft_config,
    read_peft_settings,
)
from megatron_idpo.lora.adapters import Adapters, expert_target, hf_module, weight_shape
from megatron_idpo.lora.expert_tensors import expert_module, gather_whole, read_experts
from megatron_idpo.lora.fused_modules import (
    Module,
    architecture_fuses,
    block_of,
    check_blocks,
    file_settings,
    first_row,
    modules_of,
    stacked,
)
from megatron_idpo.mcore.lora.chunk import AdapterTensor
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import gather_tensor_shards, rank_coordinates
from megatron_idpo.mcore.parallel.world import broadcast_from_rank0, raise_on_all_ranks

_PEFT_ROOT = "base_model.model"
"""PEFT's wrapper, and the model in it."""


def save_peft(
    adapters: Adapters,
    architecture: Architecture,
    directory: Path,
    base_model: str,
    *,
    companions: Sequence[Path] = (),
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`. Collective.

    The first data-parallel replica writes, one tensor at a time, each pipeline stage its own
    layers. Values keep the adapters' dtype.

    Args:
        adapters: of this rank's chunks.
        architecture: of the model.
        directory: appears only when it is complete; an existing adapter is replaced.
        base_model: where PEFT finds the base model: a directory or a name on the hub, written as
            it is.
        companions: generation config and tokenizer files to copy; used on rank 0.

    Raises:
        CheckpointError: on every rank; it cannot be written, and nothing is left behind.
    """
    shapes = peft_shapes(adapters.settings, architecture)
    # Of the config: a stage may have no adapted layer, and every rank needs the same dtype.
    dtype: torch.dtype = adapters.chunks[0].config.params_dtype
    config = peft_config(adapters.settings, architecture, base_model)

    def add_config(incomplete: Path) -> None:
        copy_companions(companions, incomplete)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (incomplete / CONFIG_NAME).write_text(text, encoding="utf-8")

    writer = HfWriter(
        directory,
        [TensorSpec(name, shape, dtype) for name, shape in shapes.items()],
        token=broadcast_from_rank0(lambda: uuid4().hex[:8]),
        single_file=WEIGHTS_NAME,
        max_shard_bytes=sys.maxsize,
        checksums=True,
        overwrite=True,
    )
    write_together(writer, _module_tensors(adapters, architecture), add_config)


def load_peft(adapters: Adapters, architecture: Architecture, directory: Path) -> None:
    """Load an adapter saved by PEFT or `save_peft`, casting to the adapters' dtype.

    Each rank reads its own slices. Collective only in that a failure on any rank is raised on all.

    Args:
        adapters: of this rank's chunks.
        architecture: of the model.
        directory: with `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        CheckpointError: other rank, scale or targets than the adapters', an unsupported option, a
            missing, unknown or wrong-shaped tensor, a damaged file.
    """
    coordinates = rank_coordinates()
    shard = Shard(coordinates.tp_rank, coordinates.tp_size)
    with raise_on_all_ranks("reading the adapter"), torch.no_grad():
        settings, saved = adapters.settings, read_peft_settings(directory)
        check_same_adapter(saved, settings, directory)
        checkpoint = open_adapter(directory)
        checkpoint.check(_shapes(settings, architecture, saved.rank))
        checkpoint.verify(share=dist.get_rank(), shares=dist.get_world_size())
        dtypes = {name: checkpoint.dtype(name) for name in checkpoint.names()}
        check_floating(str(directory), dtypes)
        module_of = {
            target: module
            for module in modules_of(settings, architecture)
            for target in module.targets
        }
        for tensor in adapters.tensors():
            if tensor.is_expert:
                name = tensor_name(tensor, settings)
                read_experts(tensor, checkpoint, name, coordinates)
            else:
                module = module_of[tensor.projection]
                name = peft_name(hf_module(tensor.layer, module.name), tensor.side)
                block = block_of(module, tensor.projection, settings, saved.rank)
                _read_block(tensor, checkpoint, name, module, block, architecture, shard)
            check_range(str(directory), name, tensor.parameter, dtypes[name])


def _read_block(
    tensor: AdapterTensor,
    checkpoint: HfCheckpoint,
    name: str,
    module: Module,
    block: slice,
    architecture: Architecture,
    shard: Shard,
) -> None:
    """Read this rank's part of a projection's A or B from its module's tensor."""
    num_rows, num_columns = architecture.projection_shape(tensor.projection)
    if tensor.side == "A":
        columns = shard.of(num_columns) if tensor.split_dim == 1 else None
        tensor.parameter.copy_(checkpoint.read(name, block, columns))
        return
    rows = shard.of(num_rows) if tensor.split_dim == 0 else slice(0, num_rows)
    start = first_row(module, tensor.projection, architecture)
    up = checkpoint.read(name, slice(start + rows.start, start + rows.stop))
    check_blocks(f"{checkpoint.directory}: {name}", up, block)
    tensor.parameter.copy_(up[:, block])


def peft_name(module: str, side: str) -> str:
    """Name of A or B of a module in `adapter_model.safetensors`."""
    return f"{_PEFT_ROOT}.{module}.lora_{side}.weight"


def tensor_name(tensor: AdapterTensor, settings: LoraConfig) -> str:
    """Name of a whole tensor in `adapter_model.safetensors`."""
    if tensor.is_expert:
        module = expert_module(tensor.layer, tensor.projection, settings)
    else:
        module = hf_module(tensor.layer, tensor.projection)
    return peft_name(module, tensor.side)


def peft_shapes(settings: LoraConfig, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Shapes of an adapter's whole tensors by PEFT's names, in layer order.

    A is `[rank, inputs]`, B is `[outputs, rank]`; those of experts have the rank of all of them.
    """
    return _shapes(settings, architecture, file_settings(settings, architecture).rank)


def _shapes(
    settings: LoraConfig, architecture: Architecture, rank: int
) -> dict[str, tuple[int, int]]:
    """Those of an adapter whose modules have this rank."""
    shapes = {}
    for layer in range(architecture.num_layers):
        for module in modules_of(settings, architecture):
            sizes = [architecture.projection_shape(name) for name in module.projections]
            name = hf_module(layer, module.name)
            shapes[peft_name(name, "A")] = (rank, sizes[0][1])
            shapes[peft_name(name, "B")] = (sum(rows for rows, _ in sizes), rank)
        in_experts = settings.expert_parameters if architecture.has_experts(layer) else ()
        for parameter in in_experts:
            target = expert_target(parameter)
            name = expert_module(layer, target, settings)
            outputs, inputs = weight_shape(target, architecture)
            expert_ranks = settings.rank_of(parameter) * architecture.num_experts
            shapes[peft_name(name, "A")] = (expert_ranks, inputs)
            shapes[peft_name(name, "B")] = (outputs, expert_ranks)
    return shapes


def whole_adapter_tensors(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """This stage's whole tensors by projection, one at a time, in the adapters' dtype.

    Under PEFT's names, unless Hugging Face's modules fuse projections. Yields on the first rank of
    a replica's tensor-parallel (and, for experts, expert-parallel) ranks only. Collective over
    these groups: a gather for every split tensor.
    """
    for tensor, whole in _whole_tensors(adapters):
        yield tensor_name(tensor, adapters.settings), whole


def _whole_tensors(adapters: Adapters) -> Iterator[tuple[AdapterTensor, Tensor]]:
    """See `whole_adapter_tensors`."""
    coordinates = rank_coordinates()
    for tensor in adapters.tensors():
        if coordinates.replica(is_expert=tensor.is_expert) > 0:
            continue
        whole = gather_whole(tensor) if tensor.is_expert else _gather_projection(tensor)
        if whole is not None:
            yield tensor, whole


def _module_tensors(adapters: Adapters, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of Hugging Face's modules, as `whole_adapter_tensors`."""
    if not architecture_fuses(architecture):
        yield from whole_adapter_tensors(adapters)
        return
    by_projection = (
        (tensor.layer, tensor.projection, tensor.side, whole)
        for tensor, whole in _whole_tensors(adapters)
    )
    for layer, module, side, whole in stacked(by_projection, adapters.settings, architecture):
        yield peft_name(hf_module(layer, module), side), whole


def _gather_projection(tensor: AdapterTensor) -> Tensor | None:
    local = tensor.parameter.detach()
    if tensor.split_dim is None:
        return local if rank_coordinates().tp_rank == 0 else None
    shards = gather_tensor_shards(local)
    return None if shards is None else torch.cat(shards, tensor.split_dim)
