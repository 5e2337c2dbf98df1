"""One optimizer step, and one reading of held-out pairs: the same batch, reference and metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.random import seed_step
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.plugin.batch_run import ReferenceLogps, run_batch
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.reference.live import Reference
from megatron_idpo.train.build import Policy
from megatron_idpo.train.finite_checks import refuse_bad_gradient, refuse_bad_losses
from megatron_idpo.train.metrics.reduce import StepMetrics, reduce_outputs


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a step needs beside its batch."""

    policy: Policy
    reference: Reference
    objective: Objective
    seed: int
    """Of the run: dropout depends on it, on the step and on the rank's place."""

    location: Callable[[int], str]
    """Where a training pair was read, for messages."""

    def step(
        self,
        batch: Batch,
        number: int,
        *,
        lr: float,
        extra: Callable[[], Mapping[str, float]] = dict,
        peaks: Callable[[], Mapping[str, float]] = dict,
    ) -> tuple[StepMetrics, float]:
        """Learn from a global batch. Collective.

        Args:
            batch: this rank's part of it.
            number: of the step in the run, from 1.
            lr: of this step.
            extra: asked after the backward pass, for numbers to be summed over ranks along with the
                metrics.
            peaks: likewise, for numbers of which the highest is wanted.

        Returns:
            The metrics, and the whole gradient's norm before clipping; the same on every rank.

        Raises:
            TrainingError: on every rank; a loss or the gradient is NaN or infinite. Losses are
                looked at before the weights are touched, the gradient's norm is known after.
        """
        seed_step(self.seed, number)
        reference_logps = self.reference.logps(batch)
        self.policy.trainable.begin_step()
        outputs = self._run(batch, reference_logps, training=True)
        metrics = self._reduced(batch, outputs, extra(), peaks())
        refuse_bad_losses(metrics, outputs, batch.rows, number, self.location)
        grad_norm = self.policy.trainable.step(lr)
        refuse_bad_gradient(grad_norm, number)
        return metrics, grad_norm

    def read(self, batch: Batch, reference_logps: ReferenceLogps | None) -> StepMetrics:
        """What the policy says of a batch, dropout off. Collective; nothing is learnt."""
        return self._reduced(batch, self._run(batch, reference_logps, training=False))

    def _run(
        self, batch: Batch, reference_logps: ReferenceLogps | None, *, training: bool
    ) -> list[LayerOutput]:
        return run_batch(
            self.policy.dpo,
            self.policy.trainable.model,
            batch,
            reference_logps,
            training=training,
            reference_free=self.reference.is_free,
        )

    def _reduced(
        self,
        batch: Batch,
        outputs: Sequence[LayerOutput],
        extra: Mapping[str, float] | None = None,
        peaks: Mapping[str, float] | None = None,
    ) -> StepMetrics:
        dpo = self.policy.dpo
        return reduce_outputs(
            outputs,
            response_lengths(batch.rows),
            self.objective,
            dpo.layers,
            dpo.num_layers,
            extra=extra,
            peaks=peaks,
        )


def response_lengths(rows: Sequence[Row]) -> list[Tensor]:
    """Response tokens of each sequence of each row: float32 `[2P]`, on the device."""
    counts = (np.bincount(row.target_sequences_N, minlength=2 * row.num_pairs) for row in rows)
    return [torch.from_numpy(count).to(default_device(), torch.float32) for count in counts]
