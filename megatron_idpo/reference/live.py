"""References that are computed while training: one more forward pass over the same rows.

All sources have one method, `logps`, which answers with what a batch's rows need on this stage.
Since a reference runs in the layout of training, over the same rows, its log-probabilities are on
the stage and the rank where the losses are, and nothing is sent; but for `reference_layer: final`,
where every stage needs what the last one knows.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.groups import from_last_stage
from megatron_idpo.plugin.attach import AttachedDpo
from megatron_idpo.plugin.batch_run import ReferenceLogps, logps_by_row, run_batch
from megatron_idpo.plugin.layer_output import LayerOutput


class Adapters(Protocol):
    """What can be switched off so that the model it lies on is the reference (`lora/`)."""

    def disabled(self) -> AbstractContextManager[None]:
        """While this lasts, the model is what it was without adapters."""


class Reference(Protocol):
    """A source of reference log-probabilities."""

    is_free: bool
    """Whether there is no reference, so that its log-probabilities count as 0."""

    is_live: bool
    """Whether every batch costs a forward pass."""

    def logps(self, batch: Batch) -> ReferenceLogps | None:
        """Those of this rank's rows, for this stage's layers. Collective over the pipeline.

        Returns:
            None if `is_free`.
        """


class AdapterOff:
    """The model without its adapters."""

    is_free = False
    is_live = True

    def __init__(self, dpo: AttachedDpo, model: Sequence[Any], adapters: Adapters) -> None:
        """Take the trained model and its adapters."""
        self._dpo = dpo
        self._model = model
        self._adapters = adapters

    def logps(self, batch: Batch) -> ReferenceLogps:
        """A forward pass of the trained model with its adapters off."""
        with self._adapters.disabled():
            outputs = run_batch(self._dpo, self._model, batch, None)
        return _by_row(self._dpo, outputs, batch)


class Resident:
    """A second, frozen model in memory."""

    is_free = False
    is_live = True

    def __init__(self, dpo: AttachedDpo, model: Sequence[Any]) -> None:
        """Take the frozen model, with the same layers tapped as in the trained one."""
        self._dpo = dpo
        self._model = model

    def logps(self, batch: Batch) -> ReferenceLogps:
        """A forward pass of the frozen model."""
        outputs = run_batch(self._dpo, self._model, batch, None)
        return _by_row(self._dpo, outputs, batch)


class Offloaded:
    """A second, frozen model in the host's memory, on the device for its forward passes only.

    Weights are copied in for each global batch. Nothing is copied back: they do not change.
    """

    is_free = False
    is_live = True

    def __init__(self, dpo: AttachedDpo, model: Sequence[Any]) -> None:
        """Move the frozen model's weights out of the device; arguments as for `Resident`."""
        self._resident = Resident(dpo, model)
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        self._host = [(parameter, _in_host_memory(parameter.data)) for parameter in parameters]
        self._move_out()

    def logps(self, batch: Batch) -> ReferenceLogps:
        """A forward pass of the frozen model."""
        device = default_device()
        for parameter, host in self._host:
            parameter.data = host.to(device, non_blocking=True, copy=True)
        try:
            return self._resident.logps(batch)
        finally:
            self._move_out()

    def _move_out(self) -> None:
        for parameter, host in self._host:
            parameter.data = host


class NoReference:
    """Reference-free training: log-ratios are log-probabilities."""

    is_free = True
    is_live = False

    def logps(self, batch: Batch) -> None:
        """Nothing to compare to."""
        return None


def _in_host_memory(weight: Tensor) -> Tensor:
    """A copy of a weight, pinned where there is a device to copy it to."""
    host = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
    return host.copy_(weight)


def _by_row(dpo: AttachedDpo, outputs: Sequence[LayerOutput], batch: Batch) -> ReferenceLogps:
    """What this stage needs of a reference's outputs. Collective over the pipeline."""
    by_row = logps_by_row(outputs, len(batch.rows))
    if dpo.reads_final_reference:
        sizes = [2 * row.num_pairs for row in batch.rows]
        final = torch.zeros(sum(sizes), device=default_device())
        if all(dpo.num_layers in row for row in by_row):
            final = torch.cat([row[dpo.num_layers] for row in by_row])
        for row, logps_2P in zip(by_row, from_last_stage(final).split(sizes), strict=True):
            row[dpo.num_layers] = logps_2P
    return by_row
