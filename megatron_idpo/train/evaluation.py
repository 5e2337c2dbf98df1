"""Held-out pairs, read again and again while training goes on."""

from collections.abc import Callable

from megatron_idpo.data.packing.batches import Batch, EvaluationBatches, RowSettings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.plugin.batch_run import ReferenceLogps
from megatron_idpo.reference.live import Reference
from megatron_idpo.train.metrics.reduce import StepMetrics
from megatron_idpo.train.step import Trainer


class Evaluation:
    """Every held-out pair once, whenever asked.

    The reference does not change, so a live one is asked the first time only: its log-probabilities
    are a few numbers per pair and layer.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: Reference,
        pairs: PairDataset,
        rows: RowSettings,
        *,
        global_batch_pairs: int,
    ) -> None:
        """Check the pairs' lengths; read nothing yet. The reference knows these pairs.

        Raises:
            DataError: a pair is longer than a row.
        """
        self._trainer = trainer
        self._reference = reference
        self._batches = EvaluationBatches(pairs, rows, global_batch_pairs=global_batch_pairs)
        self._known: list[ReferenceLogps | None] = []

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def run(self, advance: Callable[[], None]) -> StepMetrics:
        """The metrics of all held-out pairs, dropout off. Collective.

        Args:
            advance: called after each batch.
        """
        total: StepMetrics | None = None
        for number, batch in enumerate(self._batches):
            metrics = self._trainer.read(batch, self._reference_logps(number, batch))
            total = metrics if total is None else total + metrics
            advance()
        assert total is not None, "there is a pair at least"
        return total

    def _reference_logps(self, number: int, batch: Batch) -> ReferenceLogps | None:
        """The batch's with this number, the same in every run over the pairs."""
        if not self._reference.is_live:
            return self._reference.logps(batch)
        if number == len(self._known):
            self._known.append(self._reference.logps(batch))
        return self._known[number]
