"""Evaluation of the policy on the held-out pairs."""

from collections.abc import Callable

from megatron_idpo.data.packing.batches import Batch, EvaluationBatches, RowSettings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.plugin.batch_run import ReferenceLogps
from megatron_idpo.reference.sources import Reference
from megatron_idpo.train.metrics.reduce import StepMetrics
from megatron_idpo.train.step import TrainStep


class Evaluation:
    """Evaluates every held-out pair once per call of `run`.

    The reference does not change, so a live one runs in the first evaluation only. Its
    log-probabilities are kept: two floats per pair and layer.
    """

    def __init__(
        self,
        train_step: TrainStep,
        reference: Reference,
        pairs: PairDataset,
        rows: RowSettings,
        *,
        global_batch_pairs: int,
    ) -> None:
        """Check the lengths of the pairs.

        Args:
            train_step: with the policy.
            reference: of these pairs.
            pairs: held out.
            rows: how pairs are packed.
            global_batch_pairs: pairs per batch.

        Raises:
            DataError: a pair is longer than a row.
        """
        self._train_step = train_step
        self._reference = reference
        self._batches = EvaluationBatches(pairs, rows, global_batch_pairs=global_batch_pairs)
        self._cached_logps: list[ReferenceLogps | None] = []

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def run(
        self, advance: Callable[[], None] | None = None, *, reference: Reference | None = None
    ) -> StepMetrics:
        """Metrics of all held-out pairs, with dropout off. Collective.

        Args:
            advance: called after each batch.
            reference: to compare to instead of the run's reference.
        """
        total = self._run(advance or (lambda: None), reference, until_stop=False)
        assert total is not None, "no held-out pairs"
        return total

    def run_until_stop(self, advance: Callable[[], None]) -> StepMetrics | None:
        """As `run`; None if a rank has received a stop signal before the last batch. Collective."""
        return self._run(advance, None, until_stop=True)

    def _run(
        self, advance: Callable[[], None], reference: Reference | None, *, until_stop: bool
    ) -> StepMetrics | None:
        total: StepMetrics | None = None
        for index, batch in enumerate(self._batches):
            if until_stop and total is not None and total.stop_requested:
                return None
            if reference is not None:
                reference_logps = reference.logps(batch)
            else:
                reference_logps = self._reference_logps(index, batch)
            metrics = self._train_step.evaluate(batch, reference_logps)
            total = metrics if total is None else total + metrics
            advance()
        return total

    def _reference_logps(self, index: int, batch: Batch) -> ReferenceLogps | None:
        """Of the batch with this index; batches are the same in every evaluation."""
        if not self._reference.needs_forward:
            return self._reference.logps(batch)
        if index == len(self._cached_logps):
            self._cached_logps.append(self._reference.logps(batch))
        return self._cached_logps[index]
