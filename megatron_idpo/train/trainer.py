"""A training run on this rank: its parts, its position, and how it saves and resumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_idpo.checkpoint.metadata import Progress
from megatron_idpo.checkpoint.retention import CheckpointInfo
from megatron_idpo.checkpoint.store import Checkpoints
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.errors import CheckpointError, TrainingError
from megatron_idpo.mcore.parallel.world import World, raise_on_all_ranks
from megatron_idpo.train.evaluation import Evaluation
from megatron_idpo.train.finite_checks import check_weights_finite
from megatron_idpo.train.policy import Policy
from megatron_idpo.train.run_directory import RunDirectory
from megatron_idpo.train.schedule import LearningRate
from megatron_idpo.train.step import TrainStep


@dataclass(slots=True, kw_only=True)
class Trainer:
    """The parts and the position of a run; built by `setup.assemble`, driven by `loop`."""

    config: RunConfig
    world: World
    output: RunDirectory
    pairs: RunPairs
    rows: RowSettings
    train_step: TrainStep
    batches: TrainingBatches
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    learning_rate: LearningRate
    reference: FrozenModel
    """The reference model, also where `reference.source` is `none`."""

    resumed_from: Path | None = None
    """Directory of the checkpoint that this run resumed from."""

    recompute_message: str | None = None
    """What `training.recompute: auto` has chosen; `config` has the choice."""

    ignored_settings: Sequence[str] = ()
    """Settings that were changed after the last step: a line for each."""

    step: int = 0
    """Optimizer steps taken."""

    lacks_evaluation: bool = False
    """Whether the run resumed from a step that was saved before its evaluation: it was stopped."""

    eval_values: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the evaluation after the current step; empty if there was none."""

    @property
    def policy(self) -> Policy:
        """The model that is trained."""
        return self.train_step.policy

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy equals the reference before its first step."""
        return self.policy.start.identity == self.reference.identity

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.learning_rate.total_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.total_steps

    def held_out_metrics(self) -> dict[str, float]:
        """Metrics of the held-out pairs at the current step; empty if there are none. Collective.

        They are evaluated again if the step was taken before this start.
        """
        if self.evaluation is None:
            return {}
        return dict(self.eval_values) or self.evaluation.run().evaluation_values()

    def is_due(self, every_steps: int | None) -> bool:
        """Whether the current step is a multiple of `every_steps`; None is never."""
        return every_steps is not None and self.step % every_steps == 0

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the held-out pairs are evaluated after the current step."""
        every_steps = self.config.training.eval_every_steps
        return self.evaluation is not None and (self.is_due(every_steps) or self.is_complete)

    def save(self) -> CheckpointInfo | None:
        """Start to write a checkpoint of this step in the background. Collective.

        Returns:
            The checkpoint of an earlier save that this one had to wait for.

        Raises:
            CheckpointError: on every rank; it cannot be written.
            TrainingError: on every rank; a weight is NaN or infinite, and nothing is written.
        """
        trainable = self.policy.trainable
        try:
            check_weights_finite(self.policy.chunks, self.step)
        except TrainingError as error:
            raise self.with_last_checkpoint(error) from error
        score = self.eval_values.get(self.config.checkpoint.best_metric)
        return self.checkpoints.save(
            trainable.model, trainable.optimizer, self.progress(), score=score
        )

    def resume(self, checkpoint: CheckpointInfo) -> None:
        """Load weights, optimizer state and the step from a checkpoint. Collective.

        Raises:
            CheckpointError: on every rank; it cannot be read.
        """
        trainable = self.policy.trainable
        progress = self.checkpoints.load(checkpoint, trainable.model, trainable.optimizer)
        self.step = progress.step
        self.resumed_from = checkpoint.directory
        self.lacks_evaluation = self.is_evaluation_due and not progress.metrics

    def with_last_checkpoint(self, error: TrainingError) -> TrainingError:
        """The error, extended by the checkpoint that the run can resume from. Collective."""
        try:
            # The save in the background may be the newest: wait for it first.
            self.checkpoints.wait()
            checkpoint = self.checkpoints.latest()
        except CheckpointError as save_error:
            return TrainingError(f"{error}; the last save failed too: {save_error}")
        if checkpoint is None:
            return TrainingError(f"{error}; no checkpoint has been saved yet")
        return TrainingError(f"{error}; last checkpoint: {checkpoint.directory}")

    def write_config(self) -> None:
        """Write the resolved configuration to the output directory. Collective.

        Raises:
            ConfigError: on every rank; it cannot be written.
        """
        with raise_on_all_ranks("writing the configuration"):
            if self.world.is_first:
                self.output.write_config(self.config.dump())

    def progress(self) -> Progress:
        """The position of the run, as a checkpoint records it."""
        return Progress(
            step=self.step,
            data=dict(self.batches.state_dict()),
            data_fingerprint=self.pairs.train.fingerprint,
            base_model=self.policy.start.identity,
            reference=self.reference.identity,
            config=self.config.model_dump(mode="json"),
            metrics=dict(self.eval_values),
            layout={**self.config.layout.model_dump(mode="json"), "world": self.world.size},
        )
