"""Held-out pairs, read again and again while training goes on."""

from collections.abc import Callable

from megatron_idpo.data.batches import EvaluationBatches, RowSettings
from megatron_idpo.data.dataset import PairDataset
from megatron_idpo.plugin.batch_run import ReferenceLogps
from megatron_idpo.train.metrics import StepMetrics
from megatron_idpo.train.step import Trainer


class Evaluation:
    """Every held-out pair once, whenever asked.

    The reference does not change, so its log-probabilities are asked for the first time only: a few
    numbers per pair and layer.
    """

    def __init__(
        self, trainer: Trainer, pairs: PairDataset, rows: RowSettings, *, global_batch_pairs: int
    ) -> None:
        """Check the pairs' lengths; read nothing yet.

        Raises:
            DataError: a pair is longer than a row.
        """
        self._trainer = trainer
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
            if number == len(self._known):
                self._known.append(self._trainer.reference.logps(batch))
            metrics = self._trainer.read(batch, self._known[number])
            total = metrics if total is None else total + metrics
            advance()
        assert total is not None, "there is a pair at least"
        return total
