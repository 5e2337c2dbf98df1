"""Setting up a run: checks before weights are read, then every part of the trainer.

`prepare` checks the configuration against model and data. `assemble` builds the trainer and, if the
output directory has a checkpoint, resumes from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idpo.checkpoint.metadata import Progress, Record, check_same_run
from megatron_idpo.checkpoint.retention import CheckpointInfo
from megatron_idpo.checkpoint.store import Checkpoints
from megatron_idpo.config.objective import SORTED
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.training import CheckpointConfig
from megatron_idpo.convert.hf_io.hub import fetch_models, fetch_tokenizer
from megatron_idpo.convert.model_source import FrozenModel, open_model
from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches, check_pairs
from megatron_idpo.data.pairs import pair_tokens
from megatron_idpo.data.run_pairs import RunPairs, check_tokens, load_run_pairs, row_settings
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import CheckpointError, ConfigError, DataError, Problem
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.mcore.parallel.world import (
    StopFlag,
    World,
    all_gather_objects,
    raise_on_all_ranks,
)
from megatron_idpo.mcore.rope.rotary import max_sequence_length
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.storage.provenance import as_problems, diff
from megatron_idpo.train.evaluation import Evaluation
from megatron_idpo.train.logging.loggers import logger_problems
from megatron_idpo.train.policy import build_policy, check_adapter
from megatron_idpo.train.recompute import choose_recompute
from megatron_idpo.train.recording import recording_problems
from megatron_idpo.train.references import find_caches, prepare_references
from megatron_idpo.train.run_directory import RunDirectory
from megatron_idpo.train.schedule import LearningRate
from megatron_idpo.train.step import TrainStep
from megatron_idpo.train.trainer import Trainer

_LOWER_IS_BETTER = ("eval_loss",)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before weights are read."""

    pairs: RunPairs
    start: FrozenModel
    """The model that the policy starts from."""

    reference: FrozenModel


def prepare(config: RunConfig, world: World) -> Prepared:
    """Check the configuration against the model and read the data. Collective.

    Raises:
        UserError: on every rank, with all problems of the configuration for this model.
    """
    (model_path,) = fetch_models([config.model.path])
    with raise_on_all_ranks("opening the model"):
        source = open_model(model_path)
        check_against_model(config, source.architecture, world.size)
    tokenizer = fetch_tokenizer(config.model.tokenizer)
    with raise_on_all_ranks("reading the data"):
        pairs = load_run_pairs(config, model_path, tokenizer)
        check_tokens(pairs, source.architecture.vocab_size)
        rows = row_settings(config, world.size)
        for dataset in filter(None, (pairs.train, pairs.eval)):
            check_pairs(dataset, rows)
            _check_one_row(dataset, rows, config)
        if config.lora is not None:
            check_adapter(config.lora.for_model(source.architecture))
    _check_same_pairs(pairs)
    adapter = None if config.lora is None else config.lora.adapter
    reference = FrozenModel.of(source)
    start = reference
    if adapter is not None:
        start = reference.with_adapter(Path(adapter).expanduser())
    return Prepared(pairs, start, reference)


def _check_same_pairs(pairs: RunPairs) -> None:
    """Check that all ranks have read the same pairs. Collective: an all-gather of an object.

    Machines without a common file system may have different files: the stages of a pipeline would
    then train on different answers, and only a shared cache of the reference would show it.

    Raises:
        DataError: on every rank.
    """
    own = [None if each is None else each.fingerprint for each in (pairs.train, pairs.eval)]
    by_rank = all_gather_objects(own)
    for name, prints in zip(("data.train", "data.eval"), zip(*by_rank, strict=True), strict=True):
        others = [rank for rank, one in enumerate(prints) if one != prints[0]]
        if others:
            message = f"has other pairs on rank {others[0]} than on rank 0"
            remedy = "give every machine the same files and the same tokenizer"
            raise DataError.at(name, message, remedy)


def assemble(
    config: RunConfig,
    world: World,
    output: RunDirectory,
    prepared: Prepared,
    stop_flag: StopFlag | None = None,
) -> Trainer:
    """Build the trainer, compute its reference cache, and resume. Collective.

    Args:
        config: of the run; its layout is running.
        world: all processes.
        output: the run's directory.
        prepared: result of `prepare`.
        stop_flag: whether this process has received a stop signal.

    Raises:
        UserError: on every rank.
        RunStopped: on every rank; a signal came while the cache was computed.
    """
    pairs, training, stop_flag = prepared.pairs, config.training, stop_flag or StopFlag()
    size, seed = training.global_batch_pairs, config.data.seed
    rows = row_settings(config, world.size, data_rank=rank_coordinates().data_rank)
    with raise_on_all_ranks("packing the data"):
        batches = TrainingBatches(
            pairs.train, rows, global_batch_pairs=size, seed=seed, epochs=training.epochs
        )
    checkpoints = _checkpoints(output, config.checkpoint)
    checkpoint = find_resume_checkpoint(checkpoints, config.checkpoint)
    steps_taken, saved_config = 0, None
    if checkpoint is not None:
        # Before weights are read: a checkpoint of another run is rejected within seconds.
        saved_config = _resume_data(checkpoint, config, batches, prepared)
        steps_taken = checkpoint.step
    config, recompute = choose_recompute(config, pairs.train, world.size, saved_config)
    learning_rate = _learning_rate(config, steps_taken + batches.remaining_batches)
    ignored: Sequence[str] = ()
    if saved_config is not None and steps_taken >= learning_rate.total_steps:
        config, ignored = _as_trained(config, saved_config)
    caches = find_caches(config, prepared.reference, pairs)
    policy = build_policy(config, prepared.start, show_progress=world.is_first)
    reference, eval_reference = prepare_references(
        config, policy, prepared.reference, caches, rows, stop_flag
    )
    train_step = TrainStep(
        policy, reference, config.objective, training.seed, pairs.train.location, stop_flag
    )
    evaluation = None
    with raise_on_all_ranks("packing the held-out data"):
        if pairs.eval is not None:
            evaluation = Evaluation(
                train_step, eval_reference, pairs.eval, rows, global_batch_pairs=size
            )
    trainer = Trainer(
        config=config,
        world=world,
        output=output,
        pairs=pairs,
        rows=rows,
        train_step=train_step,
        batches=batches,
        evaluation=evaluation,
        checkpoints=checkpoints,
        learning_rate=learning_rate,
        reference=prepared.reference,
        recompute_message=recompute,
        ignored_settings=ignored,
    )
    # After the references: they may be computed by the policy at its start.
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer


def _learning_rate(config: RunConfig, available_steps: int) -> LearningRate:
    """The schedule over the whole run.

    Args:
        config: of the run.
        available_steps: steps taken by earlier starts, and the batches that remain. The batch size
            may have changed in between, so the number is not a function of the data alone.
    """
    max_steps = config.training.max_steps or available_steps
    return LearningRate(config.optimizer, min(available_steps, max_steps))


def check_against_model(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    """Check that this model can be trained by this configuration on so many ranks. Not collective.

    Raises:
        ConfigError: with every problem.
    """
    problems = [*config.layout.problems_for(architecture, world_size)]
    try:
        layers = resolve_layers(config.objective.layers, architecture.num_layers)
        config.objective.layer_scales(len(layers))
    except ConfigError as error:
        problems += error.problems
    if config.objective.router_aux_loss and not architecture.num_experts:
        message = f"has no effect: {architecture.family} models have no experts"
        problems.append(Problem("objective.router_aux_loss", message, "leave it out"))
    problems += [*logger_problems(config.logging), *recording_problems(config.training)]
    longest_tokens = config.data.max_length or config.data.row_tokens
    limit_tokens = max_sequence_length(architecture)
    if limit_tokens is not None and longest_tokens > limit_tokens:
        message = f"allows {longest_tokens} tokens, but this {architecture.family} model changes "
        message += f"its rotary embedding above {limit_tokens} (original_max_position_embeddings)"
        remedy = f"set data.max_length to at most {limit_tokens}"
        problems.append(Problem("data.max_length", message, remedy))
    if config.model.dtype == "fp16":
        message = "is fp16, which has not been tested in training"
        problems.append(Problem("model.dtype", message, "use bf16 or fp32"))
    if problems:
        raise ConfigError.of(problems)


def _check_one_row(pairs: PairDataset, rows: RowSettings, config: RunConfig) -> None:
    """Check that losses of sorted values get every global batch as one micro-batch.

    Raises:
        ConfigError: a batch may need several rows, or there are several data-parallel ranks.
    """
    if not config.objective.uses(*SORTED):
        return
    text, size = " and ".join(config.objective.losses), config.training.global_batch_pairs
    message = f"is {text}, which compares all pairs of a global batch: they must be in one row"
    if rows.data_size * rows.rows_multiple > 1:
        remedy = "use a layout without data parallelism and interleaving, or another loss"
        raise ConfigError.at("objective.loss", message, remedy)
    tokens_P = pair_tokens(pairs.lengths_P3[:], share_prompt=rows.share_prompt)
    needed_tokens = int(np.sort(tokens_P)[-size:].sum())
    if needed_tokens > rows.row_tokens:
        message += f" of data.row_tokens = {rows.row_tokens}"
        remedy = f"set data.row_tokens to {needed_tokens}, lower training.global_batch_pairs"
        raise ConfigError.at("objective.loss", message, f"{remedy}, or use another loss")


def find_resume_checkpoint(
    checkpoints: Checkpoints, settings: CheckpointConfig
) -> CheckpointInfo | None:
    """The newest checkpoint, if there is one. Collective.

    Raises:
        ConfigError: on every rank; there is one, and `checkpoint.resume` is `never`.
    """
    checkpoint = checkpoints.latest()
    if checkpoint is not None and settings.resume == "never":
        message = f"already has a checkpoint: {checkpoint.directory}"
        remedy = "name another directory, or set checkpoint.resume to auto to resume from it"
        raise ConfigError.at("training.output", message, remedy)
    return checkpoint


def check_can_resume(saved: Progress, current: Progress, config: RunConfig, location: str) -> None:
    """Check that a checkpoint belongs to this run. Not collective.

    Args:
        saved: of the checkpoint.
        current: of this run at its start.
        config: of this run.
        location: directory of the checkpoint.

    Raises:
        CheckpointError: with everything that differs.
    """
    problems = check_same_run(saved, current, location)
    problems += _training_differences(saved.config, config, location)
    if problems:
        raise CheckpointError.of(problems)


def _training_differences(
    saved: Mapping[str, Any], config: RunConfig, location: str
) -> list[Problem]:
    """Changed settings that define what is learned: objective, adapters, whether with a reference.

    Layout, learning rate, length and everything about saving and logging may change.
    """
    current = config.model_dump(mode="json")
    remedy = "keep it as it was, or name another output directory"
    sections = ("objective", "lora")
    differences = diff(
        {section: saved.get(section) or {} for section in sections},
        {section: current[section] or {} for section in sections},
    )
    before, now = (saved.get("reference") or {}).get("source"), current["reference"]["source"]
    # The kind of reference may change, but not whether there is one.
    if (before == "none") != (now == "none"):
        differences += diff({"reference.source": before}, {"reference.source": now})
    return as_problems(differences, location, remedy)


def _as_trained(config: RunConfig, saved: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The configuration of a run that is complete, with the settings that it was trained with.

    The run is exported again, and its configuration and model card describe it.

    Returns:
        It, and a line for each setting that was changed since and has no effect.
    """
    names = ("epochs", "max_steps", "global_batch_pairs", "seed")
    before, now = (
        {
            "optimizer": sections["optimizer"],
            "training": {name: sections["training"][name] for name in names},
        }
        for sections in (saved, config.model_dump(mode="json"))
    )
    as_trained = {
        "optimizer": type(config.optimizer).model_validate(before["optimizer"]),
        "training": config.training.model_copy(update=before["training"]),
    }
    return config.model_copy(update=as_trained), [str(each) for each in diff(before, now)]


def _resume_data(
    checkpoint: CheckpointInfo, config: RunConfig, batches: TrainingBatches, prepared: Prepared
) -> Mapping[str, Any]:
    """Move the data to the checkpoint's position, if it belongs to this run. Collective.

    Returns:
        The configuration that the checkpoint was written with.

    Raises:
        CheckpointError: on every rank.
    """
    with raise_on_all_ranks("reading the checkpoint's progress"):
        saved = Record.read(checkpoint.directory).progress
        current = Progress(
            step=0,
            data=dict(batches.state_dict()),
            data_fingerprint=prepared.pairs.train.fingerprint,
            base_model=prepared.start.identity,
            reference=prepared.reference.identity,
            config={},
        )
        check_can_resume(saved, current, config, str(checkpoint.directory))
        batches.load_state_dict(saved.data)
    return saved.config


def _checkpoints(output: RunDirectory, settings: CheckpointConfig) -> Checkpoints:
    return Checkpoints(
        output.checkpoints,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        better="min" if settings.best_metric in _LOWER_IS_BETTER else "max",
        metric=settings.best_metric,
    )
