"""A run on this rank: its parts, put together from a configuration, and where it stands.

`assemble` checks everything that can be checked before a weight is read, then builds. `Run` keeps
what the loop moves on: the step, the data's position, checkpoints, the last evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_idpo.checkpoint.metadata import Progress, Record, check_same_run
from megatron_idpo.checkpoint.retention import CheckpointInfo
from megatron_idpo.checkpoint.store import Checkpoints
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.training import CheckpointConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.convert.model_source import open_model
from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches, check_pairs
from megatron_idpo.data.run_pairs import RunPairs, check_tokens, load_run_pairs, row_settings
from megatron_idpo.errors import CheckpointError, ConfigError, TrainingError
from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.mcore.parallel.signals import StopFlag
from megatron_idpo.mcore.parallel.world import World, raise_on_all_ranks
from megatron_idpo.reference.live import Reference
from megatron_idpo.train.build import build_policy, check_adapter
from megatron_idpo.train.checks import check_against_model, check_same_training
from megatron_idpo.train.evaluation import Evaluation
from megatron_idpo.train.finite_checks import refuse_bad_weights
from megatron_idpo.train.references import find_caches, resolve_references
from megatron_idpo.train.run_directory import RunDirectory
from megatron_idpo.train.schedule import LearningRate
from megatron_idpo.train.step import Trainer

_LOWER_IS_BETTER = ("eval_loss",)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before a weight is read into a model."""

    pairs: RunPairs
    start: FrozenModel
    """What the policy starts from."""

    reference: FrozenModel
    """What it is compared to."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A run and where it stands."""

    config: RunConfig
    world: World
    output: RunDirectory
    pairs: RunPairs
    rows: RowSettings
    trainer: Trainer
    batches: TrainingBatches
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    learning_rate: LearningRate
    reference: FrozenModel
    """What the policy is compared to, if to anything."""

    step: int = 0
    """Optimizer steps taken."""

    evaluated: Mapping[str, float] = field(default_factory=dict)
    """The last evaluation's values, if it was after this very step."""

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy was the reference before its first step."""
        return self.trainer.policy.start.identity == self.reference.identity

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.learning_rate.total_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.total_steps

    def is_due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps happens now."""
        return every_steps is not None and self.step % every_steps == 0

    def save(self) -> None:
        """Begin to write a checkpoint of this step, in the background. Collective.

        Raises:
            CheckpointError: on every rank; it cannot be written.
            TrainingError: on every rank; a weight is no number, and nothing is written.
        """
        trainable = self.trainer.policy.trainable
        try:
            refuse_bad_weights(self.trainer.policy.chunks, self.step)
        except TrainingError as error:
            raise self.with_last_good(error) from error
        score = self.evaluated.get(self.config.checkpoint.best_metric)
        self.checkpoints.save(trainable.model, trainable.optimizer, self.progress(), score=score)

    def resume(self) -> Path | None:
        """Go on from the newest checkpoint, if there is one. Collective.

        Returns:
            Where that is.

        Raises:
            CheckpointError: on every rank; it cannot be read.
        """
        found = _to_go_on_from(self.checkpoints, self.config.checkpoint)
        if found is None:
            return None
        trainable = self.trainer.policy.trainable
        progress = self.checkpoints.load(found, trainable.model, trainable.optimizer)
        self.step = progress.step
        return found.directory

    def with_last_good(self, error: TrainingError) -> TrainingError:
        """What has stopped the run, and where it can go on. Collective."""
        try:
            message = self.last_good()
        except CheckpointError as failed:
            message = f"the last save failed too: {failed}"
        return TrainingError(f"{error}; {message}")

    def last_good(self) -> str:
        """Where the newest complete checkpoint is, in words, after the one being written."""
        self.checkpoints.wait()
        found = self.checkpoints.latest()
        return "nothing was saved yet" if found is None else f"last checkpoint: {found.directory}"

    def write_config(self) -> None:
        """Leave the resolved configuration in the output directory. Collective.

        Raises:
            ConfigError: on every rank; it cannot be written.
        """
        with raise_on_all_ranks("writing the configuration"):
            if self.world.is_first:
                self.output.write_config(self.config.dump())

    def progress(self) -> Progress:
        """Where the run stands, for a checkpoint."""
        return Progress(
            step=self.step,
            data=dict(self.batches.state_dict()),
            data_fingerprint=self.pairs.train.fingerprint,
            base_model=self.trainer.policy.start.identity,
            reference=self.reference.identity,
            config=self.config.model_dump(mode="json"),
            metrics=dict(self.evaluated),
            layout={**self.config.layout.model_dump(mode="json"), "world": self.world.size},
        )


def prepare(config: RunConfig, world: World) -> Prepared:
    """Look at the model and read the data. Collective.

    Raises:
        UserError: on every rank; naming all that is wrong with the configuration for this model.
    """
    with raise_on_all_ranks("looking at the model"):
        source = open_model(config.model.path)
        check_against_model(config, source.architecture, world.size)
    with raise_on_all_ranks("reading the data"):
        pairs = load_run_pairs(config)
        check_tokens(pairs, source.architecture.vocab_size)
        rows = row_settings(config, world.size)
        for dataset in filter(None, (pairs.train, pairs.eval)):
            check_pairs(dataset, rows)
        if config.lora is not None:
            check_adapter(config.lora, config.training.seed)
    adapter = None if config.lora is None else config.lora.adapter
    reference = FrozenModel.of(source)
    start = reference
    if adapter is not None:
        start = reference.with_adapter(Path(adapter).expanduser())
    return Prepared(pairs, start, reference)


def assemble(
    config: RunConfig,
    world: World,
    output: RunDirectory,
    prepared: Prepared,
    stop_flag: StopFlag | None = None,
) -> Run:
    """Build every part of a run, its reference cache included. Collective; a layout is running.

    Args:
        config: of the run.
        world: all processes.
        output: the run's directory.
        prepared: what `prepare` found.
        stop_flag: whether this process has been asked to stop; nobody asks if not given.

    Raises:
        UserError: on every rank.
        Stopped: on every rank; a signal came while the cache was made.
    """
    pairs, training = prepared.pairs, config.training
    rows = row_settings(config, world.size, data_rank=this_rank().data)
    with raise_on_all_ranks("laying out the data"):
        batches = TrainingBatches(
            pairs.train,
            rows,
            global_batch_pairs=training.global_batch_pairs,
            seed=config.data.seed,
            epochs=training.epochs,
        )
    checkpoints = _checkpoints(output, config.checkpoint)
    resumed = _to_go_on_from(checkpoints, config.checkpoint)
    steps = 0
    if resumed is not None:
        _go_on_in_data(resumed, config, batches, prepared)
        steps = resumed.step
    steps += batches.remaining_batches  # of this start's size, whatever those before had
    learning_rate = LearningRate(config.optimizer, min(steps, training.max_steps or steps))
    caches = find_caches(config, prepared.reference, pairs)
    policy = build_policy(config, prepared.start, show_progress=world.is_first)
    references = resolve_references(
        config, policy, prepared.reference, caches, rows, stop_flag or StopFlag()
    )
    trainer = Trainer(
        policy, references.train, config.objective.objective(), training.seed, pairs.train.location
    )
    return Run(
        config=config,
        world=world,
        output=output,
        pairs=pairs,
        rows=rows,
        trainer=trainer,
        batches=batches,
        evaluation=_evaluation(trainer, references.eval, pairs, rows, training.global_batch_pairs),
        checkpoints=checkpoints,
        learning_rate=learning_rate,
        reference=prepared.reference,
    )


def _evaluation(
    trainer: Trainer,
    reference: Reference,
    pairs: RunPairs,
    rows: RowSettings,
    global_batch_pairs: int,
) -> Evaluation | None:
    with raise_on_all_ranks("laying out the held-out data"):
        if pairs.eval is None:
            return None
        return Evaluation(
            trainer, reference, pairs.eval, rows, global_batch_pairs=global_batch_pairs
        )


def _checkpoints(output: RunDirectory, settings: CheckpointConfig) -> Checkpoints:
    return Checkpoints(
        output.checkpoints,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        better="min" if settings.best_metric in _LOWER_IS_BETTER else "max",
        metric=settings.best_metric,
    )


def _to_go_on_from(checkpoints: Checkpoints, settings: CheckpointConfig) -> CheckpointInfo | None:
    """The newest checkpoint, if there is one. Collective.

    Raises:
        ConfigError: on every rank; there is one, and the run was to be a new one.
    """
    found = checkpoints.latest()
    if found is not None and settings.resume == "never":
        message = f"has a checkpoint already: {found.directory}"
        remedy = "name another directory, or set checkpoint.resume to auto to go on from it"
        raise ConfigError.at("training.output", message, remedy)
    return found


def _go_on_in_data(
    found: CheckpointInfo,
    config: RunConfig,
    batches: TrainingBatches,
    prepared: Prepared,
) -> None:
    """Move the data on to where a checkpoint's run was, if it is this run's. Collective.

    Raises:
        CheckpointError: on every rank; naming all that differs.
    """
    rank = str(found.directory)
    with raise_on_all_ranks("reading the checkpoint's progress"):
        saved = Record.read(found.directory).progress
        mine = Progress(
            step=0,
            data=dict(batches.state_dict()),
            data_fingerprint=prepared.pairs.train.fingerprint,
            base_model=prepared.start.identity,
            reference=prepared.reference.identity,
            config={},
        )
        problems = check_same_run(saved, mine, rank)
        problems += check_same_training(saved.config, config, rank)
        if problems:
            raise CheckpointError.of(problems)
        batches.load_state_dict(saved.data)
