"""References that are computed while training: one more forward pass over the same rows.

All sources have one method, `logps`, which answers with what a batch's rows need on this stage.
Since a reference runs in the layout of training, over the same rows, its log-probabilities are on
the stage and the rank where the losses are, and nothing is sent.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from megatron_idpo.data.batches import Batch
from megatron_idpo.plugin.attach import AttachedDpo
from megatron_idpo.plugin.batch_run import ReferenceLogps, logps_by_row, run_batch


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
        return logps_by_row(outputs, len(batch.rows))


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
        return logps_by_row(outputs, len(batch.rows))


class NoReference:
    """Reference-free training: log-ratios are log-probabilities."""

    is_free = True
    is_live = False

    def logps(self, batch: Batch) -> None:
        """Nothing to compare to."""
        return None
