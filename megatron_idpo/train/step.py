"""One optimizer step on a global batch, and the evaluation of a batch without learning."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_idpo.config.objective import Objective
from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.mcore.model.experts import reset_statistics, take_statistics
from megatron_idpo.mcore.parallel.groups import seed_rng_for_step
from megatron_idpo.mcore.parallel.world import StopFlag
from megatron_idpo.plugin.batch_run import ReferenceLogps, run_batch
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.reference.sources import Reference
from megatron_idpo.train.finite_checks import check_gradient_finite, check_losses_finite
from megatron_idpo.train.metrics.flops import BatchWork
from megatron_idpo.train.metrics.reduce import StepMetrics, reduce_outputs
from megatron_idpo.train.metrics.throughput import peak_memory_bytes
from megatron_idpo.train.policy import Policy


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Everything a step needs except its batch."""

    policy: Policy
    reference: Reference
    objective: Objective
    seed: int
    """Of the run. Dropout depends on it, on the step and on the rank's coordinates."""

    location: Callable[[int], str]
    """Where a training pair was read (`path:line`), for error messages."""

    stop_flag: StopFlag = field(default_factory=StopFlag)
    """Whether this process has received a stop signal."""

    def train(self, batch: Batch, step: int, *, lr: float) -> tuple[StepMetrics, float]:
        """Take an optimizer step. Collective.

        Args:
            batch: this rank's part of the global batch.
            step: index in the run, from 1.
            lr: learning rate.

        Returns:
            The metrics, and the norm of the whole gradient before clipping; equal on every rank.

        Raises:
            TrainingError: on every rank; a loss or the gradient is NaN or infinite.
        """
        seed_rng_for_step(self.seed, step)
        # The reference runs first: it may be the policy with its adapters off, and its forward pass
        # must not touch the gradient buffers of this step.
        reference_logps = self.reference.logps(batch)
        self.policy.trainable.zero_grad_buffers()
        # Compiling ahead has run the model too, and its routers have counted.
        reset_statistics(self.policy.chunks)
        outputs = self._run(batch, reference_logps, training=True)
        # The stop flag and the memory peak are read after the backward pass: a signal that arrives
        # during the step stops the run at its end, on all ranks at once.
        metrics = reduce_outputs(
            outputs,
            self.objective,
            self.policy.dpo.layers,
            self.policy.dpo.num_layers,
            work=BatchWork.of(batch.rows, self.policy.source.architecture.windows),
            stop_requested=self.stop_flag.stop_requested,
            peak_memory_bytes=float(peak_memory_bytes()),
            router=take_statistics(self.policy.chunks, self.policy.dpo.num_layers),
        )
        # Losses are checked before the optimizer touches the weights. The norm is known after it.
        check_losses_finite(metrics, outputs, batch.rows, step, self.location)
        grad_norm = self.policy.trainable.step(lr)
        check_gradient_finite(grad_norm, step)
        return metrics, grad_norm

    def evaluate(self, batch: Batch, reference_logps: ReferenceLogps | None) -> StepMetrics:
        """Metrics of the policy on a batch, with dropout off. Collective."""
        outputs = self._run(batch, reference_logps, training=False)
        dpo = self.policy.dpo
        return reduce_outputs(
            outputs,
            self.objective,
            dpo.layers,
            dpo.num_layers,
            stop_requested=self.stop_flag.stop_requested,
        )

    def _run(
        self, batch: Batch, reference_logps: ReferenceLogps | None, *, training: bool
    ) -> list[LayerOutput]:
        return run_batch(
            self.policy.dpo,
            self.policy.trainable.model,
            batch,
            reference_logps,
            training=training,
            reference_free=self.reference.is_reference_free,
        )
