"""LoRA adapters on this rank's model chunks: added, disabled for the reference, merged, removed.

    chunks = ...                                       # weights loaded
    adapters = add_adapters(chunks, architecture, LoraConfig(rank=16, alpha=16.0))
    ...                                                # attach, DDP, optimizer, training
    with adapters.disabled():
        ...                                            # the base model
    export_hf(chunks, ..., value=merged_value(adapters))

Only adapters are trained. Every other parameter is frozen, so megatron-core computes no weight
gradients for it and DDP allocates no buffers.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.convert.megatron_to_hf import ParameterValue
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.lora.fused_modules import incomplete_modules
from megatron_idpo.mcore.lora.chunk import (
    EXPERT_TARGETS,
    AdapterTensor,
    ChunkAdapters,
    freeze,
    has_adapters,
    insert_adapters,
    missing_linears,
    remove_adapters,
)
from megatron_idpo.mcore.lora.linear import LoraHyperparams
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.model.chunk import RestoreFn, enable_embedding_output_grad
from megatron_idpo.mcore.model.tap import is_tapped
from megatron_idpo.mcore.parallel.groups import RankCoordinates, rank_coordinates
from megatron_idpo.mcore.parallel.world import all_gather_objects

KEPT_SHARE = 0.95
"""Below this `surviving_share` of a change, an export and a snapshot report the loss."""


def add_adapters(
    chunks: Sequence[GPTModel], architecture: Architecture, settings: LoraConfig, seed: int = 0
) -> "Adapters":
    """Add low-rank adapters to the linears of every layer, and freeze everything else.

    Call it before the plugin's `attach` and before DDP wraps the chunks. A has Kaiming's uniform
    distribution over the projection's whole input, as in PEFT, with the same values in every
    layout; B is zero, so the model's output does not change. No collective.

    Args:
        chunks: this rank's chunks, with their weights loaded.
        architecture: of the model.
        settings: rank, scale, dropout and targets.
        seed: of the initial values of A.

    Raises:
        ConfigError: chunks that are wrapped, attached or already adapted, or that lack a target
            linear of megatron-core; all reasons at once.
    """
    settings = settings.for_model(architecture)
    problems = [*incomplete_modules(settings, architecture), *_check_chunks(chunks, settings)]
    if problems:
        raise ConfigError.of(problems)
    return Adapters(chunks, architecture, settings, seed)


class Adapters:
    """The adapters of this rank's chunks, until `remove`. Created by `add_adapters`."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        settings: LoraConfig,
        seed: int,
    ) -> None:
        """Insert and initialize adapters; `add_adapters` has checked the arguments."""
        self.settings = settings
        """Rank, scale, dropout and targets."""
        self.seed = seed
        """Of the initial values of A."""
        self.chunks = list(chunks)
        """The adapted chunks."""
        # Freeze first: the adapters inserted after it stay trainable.
        self._restore: list[RestoreFn] = [freeze(chunk) for chunk in chunks]
        hyperparams = LoraHyperparams(
            settings.rank, settings.scaling, settings.dropout, settings.gate_up_rank or 0
        )
        self._by_chunk = [
            insert_adapters(chunk, _targets(settings), hyperparams) for chunk in chunks
        ]
        for chunk in chunks:
            if chunk.pre_process:
                self._restore.append(enable_embedding_output_grad(chunk))
        coordinates = rank_coordinates()
        for tensor in self.tensors():
            if tensor.side == "A":
                _, num_inputs = weight_shape(tensor.projection, architecture)
                initialize_a(tensor, seed, num_inputs, coordinates)

    def tensors(self) -> Iterator[AdapterTensor]:
        """This rank's parts of A and B of every projection in its layers."""
        for adapters in self._by_chunk:
            yield from adapters.tensors()

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trained parameters of this rank, under names that are the same in every layout."""
        for tensor in self.tensors():
            yield tensor.name, tensor.parameter

    @property
    def by_chunk(self) -> list[ChunkAdapters]:
        """The submodule of each chunk."""
        return list(self._by_chunk)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the chunks compute the base model.

        In fp32 and with Transformer Engine's layers bitwise; otherwise bitwise what adapters with
        B = 0 give, by their kernels (`mcore/lora/frozen_linear.py`).
        """
        before = [adapters.enabled for adapters in self._by_chunk]
        for adapters in self._by_chunk:
            adapters.enabled = False
        try:
            yield
        finally:
            for adapters, enabled in zip(self._by_chunk, before, strict=True):
                adapters.enabled = enabled

    def remove(self) -> None:
        """Restore the chunks, and unfreeze what was frozen. A second call does nothing.

        DDP and optimizers created meanwhile hold the adapters: create new ones to train on.
        """
        if self._by_chunk:
            for chunk in self.chunks:
                remove_adapters(chunk)
        while self._restore:
            self._restore.pop()()
        self._by_chunk = []
        self.chunks = []


def needs_local_layers(dtype: torch.dtype, *adapters: LoraConfig | None) -> bool:
    """Whether a model with such adapters, or one compared with it, needs megatron-core's layers.

    Transformer Engine's support no adapters of experts, and return outputs that are already
    rounded, where those in 16 bits hide small adapters.
    """
    present = [adapter for adapter in adapters if adapter is not None]
    is_rounded = dtype.itemsize < torch.float32.itemsize and bool(present)
    return is_rounded or any(adapter.target_parameters for adapter in present)


def _targets(settings: LoraConfig) -> list[str]:
    """Projections, and targets in experts (`EXPERT_TARGETS`)."""
    return [*settings.projections, *map(expert_target, settings.expert_parameters)]


def expert_target(parameter: str) -> str:
    """The name in `EXPERT_TARGETS` of one of PEFT's `target_parameters`."""
    return parameter.removeprefix("mlp.")


def weight_shape(projection: str, architecture: Architecture) -> tuple[int, int]:
    """Output and input features of a projection, or of one expert, in the whole model."""
    if projection in EXPERT_TARGETS:
        ffn, hidden = architecture.ffn_hidden_size, architecture.hidden_size
        return (2 * ffn, hidden) if projection.endswith("gate_up_proj") else (hidden, ffn)
    return architecture.projection_shape(projection)


def hf_module(layer: int, name: str) -> str:
    """Name of a projection's (or a fused) module in a Hugging Face model; layers count from 0."""
    is_mlp = name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    return f"model.layers.{layer}.{'mlp' if is_mlp else 'self_attn'}.{name}"


def initialize_a(
    tensor: AdapterTensor, seed: int, num_inputs: int, coordinates: RankCoordinates
) -> None:
    """Fill this rank's part of an A with `kaiming_uniform_(a=sqrt(5))` over all its inputs.

    Every rank draws the whole A on the CPU in fp32 with a generator seeded by the tensor's name (of
    experts: one A for each), so that the values depend on nothing but the seed and that name, in
    particular not on the layout.
    """
    if not tensor.is_expert:
        _draw(tensor.parameter, f"{seed} {tensor.name}", num_inputs, tensor.split_dim, coordinates)
        return
    assert tensor.first_expert is not None
    for expert, down_rI in enumerate(tensor.parameter, tensor.first_expert):
        # One dimension less than the experts of a layer together.
        split_dim = None if tensor.split_dim is None else tensor.split_dim - 1
        key = f"{seed} {tensor.name}.{expert}"
        _draw(down_rI, key, num_inputs, split_dim, coordinates, is_expert=True)


def _draw(
    down_rI: Tensor,
    key: str,
    num_inputs: int,
    split_dim: int | None,
    coordinates: RankCoordinates,
    *,
    is_expert: bool = False,
) -> None:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    whole = torch.empty(len(down_rI), num_inputs, device="cpu")
    # Kaiming's bound, sqrt(6 / ((1 + a²) * fan_in)), for a = sqrt(5).
    whole.uniform_(-1 / math.sqrt(num_inputs), 1 / math.sqrt(num_inputs), generator=generator)
    if split_dim is not None:
        # Row-parallel linears split the input features: dimension 1 of A.
        tp_rank, tp_size = coordinates.tp(is_expert=is_expert)
        whole = whole.chunk(tp_size, 1)[tp_rank]
    with torch.no_grad():
        down_rI.copy_(whole)


def merged_value(adapters: Adapters, dtype: torch.dtype | None = None) -> ParameterValue:
    """A function from a parameter of an adapted chunk to its value with the adapters merged.

    `W + scaling * B A` of this rank's shard is computed in fp32 and rounded once. It changes
    nothing and allocates one parameter at a time. Parameters without adapters are returned as they
    are.

    Args:
        adapters: of the chunks.
        dtype: of merged values; None: the parameter's.
    """
    by_weight = {
        id(weight): merged
        for chunk_adapters in adapters.by_chunk
        for weight, merged in chunk_adapters.merged_weights()
    }

    def value(parameter: torch.nn.Parameter) -> Tensor:
        merged = by_weight.get(id(parameter))
        return parameter.data if merged is None else merged().to(dtype or parameter.dtype)

    return value


def surviving_share(adapters: Adapters, dtype: torch.dtype) -> float:
    """How much of the adapters' change remains when merged weights are rounded. Collective.

    A change below half a unit in a weight's last place is lost, since the weight itself is a
    16-bit value. The share is the projection of the rounded change on the exact one: 1 if nothing
    is lost.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for chunk_adapters in adapters.by_chunk:
        for weight, merged in chunk_adapters.merged_weights():
            merged_OI = merged()
            change_OI = merged_OI - weight.detach().float()
            remaining_OI = merged_OI.to(dtype).float().sub_(weight.detach().float())
            sums[0] += torch.sum(remaining_OI.mul_(change_OI), dtype=torch.float64).cpu()
            sums[1] += torch.sum(change_OI.square_(), dtype=torch.float64).cpu()
    remaining, change = torch.stack(all_gather_objects(sums)).sum(0).tolist()
    return remaining / change if change else 1.0


def merge_in_place(adapters: Adapters) -> None:
    """Replace the weights by their merged values (`merged_value`), and zero the adapters' B.

    The old weights are lost, and an optimizer's fp32 copies of the adapters are stale afterwards:
    do not train these adapters any more.
    """
    with torch.no_grad():
        for chunk_adapters in adapters.by_chunk:
            for weight, merged in chunk_adapters.merged_weights():
                weight.copy_(merged())
        for tensor in adapters.tensors():
            if tensor.side == "B":
                tensor.parameter.zero_()


def _check_chunks(chunks: Sequence[GPTModel], settings: LoraConfig) -> list[Problem]:
    if not chunks:
        return [Problem("chunks", "is empty", "give this rank's GPTModel chunks")]
    problems = []
    for index, chunk in enumerate(chunks):
        location = f"chunks[{index}]"
        if not isinstance(chunk, GPTModel):
            message = f"is a {type(chunk).__name__}, not a GPTModel"
            remedy = "add adapters first, then wrap the chunks in DDP"
            problems.append(Problem(location, message, remedy))
        elif has_adapters(chunk):
            problems.append(Problem(location, "has adapters already", "remove() them first"))
        elif is_tapped(chunk):
            remedy = "add adapters first, then attach"
            problems.append(Problem(location, "is attached already", remedy))
        else:
            problems += missing_linears(chunk, _targets(settings))
    return list(dict.fromkeys(problems))
