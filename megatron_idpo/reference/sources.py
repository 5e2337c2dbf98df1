"""Sources of reference log-probabilities: forward passes of a frozen model, or a cache.

All sources have one method, `logps`, which returns the log-probabilities of a batch's rows that
this stage needs. A live reference runs in the layout of training, over the same rows, so its
log-probabilities are already on the stage and the rank where the losses are, and nothing is sent.
The exception is `reference_layer: final`: every stage needs the values of the last one.

Shapes: P pairs, B pairs of this rank's rows, L layers, 2 = chosen, rejected.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.model_source import FrozenModel, load_base
from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.lora.adapter_config import read_peft_settings
from megatron_idpo.lora.adapters import Adapters, add_adapters, needs_local_layers
from megatron_idpo.lora.peft import load_peft
from megatron_idpo.mcore.cpu.redirect import default_device, to_device
from megatron_idpo.mcore.lora.chunk import round_once
from megatron_idpo.mcore.model.build import ModelOptions, build_model
from megatron_idpo.mcore.parallel.pipeline import broadcast_from_last_stage
from megatron_idpo.mcore.parallel.world import raise_on_all_ranks
from megatron_idpo.plugin.attach import AttachedDpo, attach
from megatron_idpo.plugin.batch_run import ReferenceLogps, logps_by_row, run_batch
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.reference.logps_table import Logps

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.build import GPTModel


class Reference(Protocol):
    """A source of reference log-probabilities."""

    is_reference_free: bool
    """Whether there is no reference: its log-probabilities count as 0."""

    needs_forward: bool
    """Whether every batch costs a forward pass."""

    def logps(self, batch: Batch) -> ReferenceLogps | None:
        """Those of this rank's rows, for this stage's layers. Collective over the pipeline.

        Returns:
            None if `is_reference_free`.
        """


class NoReference:
    """Reference-free training: log-ratios are log-probabilities."""

    is_reference_free = True
    needs_forward = False

    def logps(self, batch: Batch) -> None:
        """None."""
        return None


class CachedReference:
    """A table computed before training: a look-up instead of a forward pass."""

    is_reference_free = False
    needs_forward = False

    def __init__(self, layers: Sequence[int], logps_PL2: Logps) -> None:
        """Args: the layers, ascending; all pairs' log-probabilities, float32 [P, L, 2]."""
        self.layers = layers
        self.logps_PL2 = logps_PL2

    @property
    def final_logps_P2(self) -> Logps:
        """Of every pair at the final layer, float32 [P, 2]."""
        return self.logps_PL2[:, -1]

    def logps(self, batch: Batch) -> ReferenceLogps:
        """Those of this rank's rows at every layer, also layers of other stages. Not collective."""
        rows = [row.pair_index_P for row in batch.rows]
        logps_BL2 = self.logps_PL2[np.concatenate(rows)]
        logps_LB2 = torch.from_numpy(np.ascontiguousarray(logps_BL2.transpose(1, 0, 2)))
        # One copy to the device for the whole batch, then views per row: chosen and rejected of a
        # row's pairs alternate, as its sequences do.
        flat_L2B = to_device(logps_LB2.flatten(1), default_device())
        by_row = flat_L2B.split([2 * len(row) for row in rows], dim=1)
        return [dict(zip(self.layers, logps.unbind(0), strict=True)) for logps in by_row]


type Active = Callable[[], AbstractContextManager[None]]
"""Makes a model the reference within the block."""


class Resident:
    """A forward pass of a frozen model in memory."""

    is_reference_free = False
    needs_forward = True

    def __init__(
        self, dpo: AttachedDpo, model: Sequence[Any], active: Active = nullcontext
    ) -> None:
        """Args: the taps, at the layers that are tapped in the policy; the chunks; see `Active`."""
        self._dpo = dpo
        self._model = model
        self._active = active

    def logps(self, batch: Batch) -> ReferenceLogps:
        """See `Reference.logps`."""
        with self._active():
            outputs = run_batch(self._dpo, self._model, batch, None)
        return _by_row(self._dpo, outputs, batch)


class AdapterOff(Resident):
    """A forward pass of the policy without its adapters."""

    def __init__(self, dpo: AttachedDpo, model: Sequence[Any], adapters: Adapters) -> None:
        """Args: the policy's taps, chunks and adapters."""
        super().__init__(dpo, model, adapters.disabled)


class Offloaded(Resident):
    """A forward pass of a frozen model in host memory, on the device only while it runs.

    Weights are copied in for each global batch. Nothing is copied back: they do not change.
    """

    def __init__(self, dpo: AttachedDpo, model: Sequence[Any]) -> None:
        """Move the weights off the device; arguments as for `Resident`."""
        super().__init__(dpo, model, self._on_device)
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        self._host_weights = [(weight, _copy_to_host(weight.data)) for weight in parameters]
        self._move_to_host()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        device = default_device()
        for parameter, host in self._host_weights:
            parameter.data = host.to(device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._move_to_host()

    def _move_to_host(self) -> None:
        for parameter, host in self._host_weights:
            parameter.data = host


def _copy_to_host(weight: Tensor) -> Tensor:
    """A copy of a weight, in pinned memory if there is a device to copy it to."""
    host = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
    return host.copy_(weight)


def _by_row(dpo: AttachedDpo, outputs: Sequence[LayerOutput], batch: Batch) -> ReferenceLogps:
    """The log-probabilities that this stage needs, per row. Collective over the pipeline."""
    by_row = logps_by_row(outputs, len(batch.rows))
    if dpo.reads_final_reference:
        # One broadcast for all rows. Only the last stage has the final layer; the others take part
        # with zeros of the same size.
        sizes = [2 * row.num_pairs for row in batch.rows]
        final = torch.zeros(sum(sizes), device=default_device())
        if all(dpo.num_layers in row for row in by_row):
            final = torch.cat([row[dpo.num_layers] for row in by_row])
        for row, logps_2P in zip(
            by_row, broadcast_from_last_stage(final).split(sizes), strict=True
        ):
            row[dpo.num_layers] = logps_2P
    return by_row


def frozen_model(
    config: RunConfig,
    model: FrozenModel,
    *,
    show_progress: bool,
    compared: Sequence[LoraConfig] = (),
) -> tuple[Sequence["GPTModel"], AttachedDpo]:
    """Load a frozen model: this rank's chunks, and their taps. Collective, within a layout.

    Args:
        config: of the run.
        model: the weights.
        show_progress: while they are loaded.
        compared: adapters of the models that it is compared with, in addition to those of the run;
            the model then rounds as they do.

    Raises:
        UserError: on every rank.
    """
    architecture, settings = model.source.architecture, None
    if model.adapter is not None:
        with raise_on_all_ranks("reading the adapter's settings"):
            settings = read_peft_settings(model.adapter)
    of_run = config.lora if config.has("lora") else None
    # The same modules and kernels as the policy's, for the same rounding.
    dtype = config.model.torch_dtype()
    needs_local = needs_local_layers(dtype, of_run, settings, *compared)
    options = ModelOptions(dtype=dtype, transformer_engine=not needs_local)
    chunks = build_model(architecture, config.layout, options)
    if needs_local:
        for chunk in chunks:
            round_once(chunk)
    load_base(model.source, chunks, show_progress=show_progress)
    if model.adapter is not None and settings is not None:
        # Not merged: the weights round as they did while the adapter was trained. Dropout is off
        # in a reference.
        load_peft(add_adapters(chunks, architecture, settings), architecture, model.adapter)
    for chunk in chunks:
        chunk.requires_grad_(False)
    dpo = attach(
        chunks,
        layers=config.objective.layers,
        objective=config.objective,
        vocab_size=architecture.vocab_size,
        use_norm=config.objective.norm == "final",
    )
    return chunks, dpo
