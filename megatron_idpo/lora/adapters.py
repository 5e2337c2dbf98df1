"""Adapters on this rank's model chunks: added, switched off for the reference, removed.

    chunks = ...                                       # weights loaded
    adapters = add_adapters(chunks, architecture, LoraConfig(rank=16, alpha=16.0))
    ...                                                # attach, DDP, optimizer, training
    with adapters.disabled():
        ...                                            # the model as it was, bit for bit

Only adapters learn: every other parameter is frozen, so megatron-core computes no weight gradients
for it and DDP gives it no buffers.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.lora.names import weight_shape
from megatron_idpo.mcore.lora.chunk import (
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
from megatron_idpo.mcore.model.chunk import RestoreFn, enable_embedding_output_grad, is_hooked
from megatron_idpo.mcore.parallel.groups import RankCoordinates, rank_coordinates


def add_adapters(
    chunks: Sequence[GPTModel], architecture: Architecture, settings: LoraConfig, seed: int = 0
) -> "Adapters":
    """Put low-rank adapters beside the linears of every layer, and freeze everything else.

    To be called before the plugin's `attach` and before DDP wraps the chunks. A is drawn from
    Kaiming's uniform distribution over the projection's whole input, as in PEFT, the same in every
    layout; B is zero, so that the model computes what it did. No collective.

    Args:
        chunks: this rank's chunks, with their weights loaded.
        architecture: what they are.
        settings: rank, scale, dropout and targets.
        seed: of the initial values of A.

    Raises:
        ConfigError: chunks that are wrapped, attached or adapted already, or that lack a target
            linear of megatron-core's own; every reason at once.
    """
    if problems := _refused(chunks, settings):
        raise ConfigError.of(problems)
    return Adapters(chunks, architecture, settings, seed)


class Adapters:
    """The adapters of this rank's chunks, until `remove`. Made by `add_adapters`."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        settings: LoraConfig,
        seed: int,
    ) -> None:
        """Insert and initialise them; `add_adapters` has checked the arguments."""
        self.settings = settings
        """Rank, scale, dropout and targets."""
        self.seed = seed
        """Of the initial values of A."""
        self.chunks = list(chunks)
        """The adapted chunks."""
        self._undo: list[RestoreFn] = [freeze(chunk) for chunk in chunks]
        numbers = LoraHyperparams(settings.rank, settings.scaling, settings.dropout)
        self._by_chunk = [insert_adapters(chunk, settings.projections, numbers) for chunk in chunks]
        self._undo += [enable_embedding_output_grad(chunk) for chunk in chunks if chunk.pre_process]
        rank = rank_coordinates()
        for one in self.tensors():
            if one.side == "A":
                _, num_inputs = weight_shape(one.projection, architecture)
                initialise(one, seed, num_inputs, rank)

    def tensors(self) -> Iterator[AdapterTensor]:
        """A and B of every projection in this rank's layers, this rank's parts of them."""
        for adapters in self._by_chunk:
            yield from adapters.tensors()

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What is trained on this rank, under names that are the same in every layout."""
        for one in self.tensors():
            yield one.name, one.parameter

    @property
    def by_chunk(self) -> list[ChunkAdapters]:
        """The submodule of each chunk."""
        return list(self._by_chunk)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the chunks compute what they did without adapters, to the bit."""
        before = [adapters.enabled for adapters in self._by_chunk]
        for adapters in self._by_chunk:
            adapters.enabled = False
        try:
            yield
        finally:
            for adapters, enabled in zip(self._by_chunk, before, strict=True):
                adapters.enabled = enabled

    def remove(self) -> None:
        """Put the chunks back as they were; what was frozen learns again. Twice does nothing.

        DDP and optimizers made meanwhile know the adapters: make new ones to train on.
        """
        if self._by_chunk:
            for chunk in self.chunks:
                remove_adapters(chunk)
        while self._undo:
            self._undo.pop()()
        self._by_chunk = []
        self.chunks = []


def initialise(one: AdapterTensor, seed: int, num_inputs: int, rank: RankCoordinates) -> None:
    """Fill this rank's part of an A, of `kaiming_uniform_(a=sqrt(5))` over all its inputs.

    The whole A is drawn on the CPU in fp32 by a generator of its own, so that a value depends on
    nothing but the seed and the tensor's name.
    """
    message = hashlib.sha256(f"{seed} {one.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(message[:8]) >> 1)
    whole = torch.empty(len(one.parameter), num_inputs, device="cpu")
    # Kaiming's bound, sqrt(6 / ((1 + a²) * fan_in)), for a = sqrt(5).
    whole.uniform_(-1 / math.sqrt(num_inputs), 1 / math.sqrt(num_inputs), generator=generator)
    part = whole if one.split_dim is None else whole.chunk(rank.tp_size, 1)[rank.tp_rank]
    with torch.no_grad():
        one.parameter.copy_(part)


def _refused(chunks: Sequence[GPTModel], settings: LoraConfig) -> list[Problem]:
    if not chunks:
        return [Problem("chunks", "is empty", "give this rank's GPTModel chunks")]
    found = []
    for number, chunk in enumerate(chunks):
        rank = f"chunks[{number}]"
        if not isinstance(chunk, GPTModel):
            wrapper = f"is a {type(chunk).__name__}, not a GPTModel"
            found.append(Problem(rank, wrapper, "add adapters first, then wrap the chunks in DDP"))
        elif has_adapters(chunk):
            found.append(Problem(rank, "has adapters already", "remove() those first"))
        elif is_hooked(chunk):
            found.append(Problem(rank, "is attached to", "add adapters first, then attach"))
        else:
            found += missing_linears(chunk, settings.projections)
    return list(dict.fromkeys(found))
