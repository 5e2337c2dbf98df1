"""Stepwise DPO: trains the steps one after the other, each from the result of the one before.

    OUTPUT/
      manifest.json        the state of each step         first_model/   the first model's scores
      step-1/ ...          an ordinary run's directory    snapshots/     each step's result
      curriculum.parquet   the pairs of each step         hf/, adapter/  the last step's result
      curriculum.md .png   report over all steps          metrics.jsonl, curves.png   of all steps

Each step is an ordinary run (`train/loop.py`) on its part of the pairs. Its start and its reference
are the result of the step before. If the run is killed, the same command resumes with the first
step that is not complete in the manifest. Everything is collective.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.errors import EXIT_PREEMPTED
from megatron_idpo.mcore.parallel.world import (
    RunStopped,
    StopFlag,
    World,
    all_gather_objects,
    catch_stop_signals,
    distributed_world,
    raise_on_all_ranks,
)
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.sdpo.compatibility import check_can_start, check_fills_a_batch, check_step
from megatron_idpo.sdpo.curriculum import (
    TABLE,
    Curriculum,
    build_curriculum,
    score_first_model,
    step_layers,
    write_curriculum,
)
from megatron_idpo.sdpo.finalize_step import StepFinalizer
from megatron_idpo.sdpo.manifest import Manifest, StepRecord, snapshot_directory
from megatron_idpo.sdpo.manifest_file import ManifestFile
from megatron_idpo.sdpo.report import missing_exports, report_steps
from megatron_idpo.sdpo.snapshot import open_snapshot
from megatron_idpo.train.callbacks import Callback
from megatron_idpo.train.elastic import waits_for_other_machines
from megatron_idpo.train.hub import check_can_push
from megatron_idpo.train.loop import preempted_before_training, train_prepared
from megatron_idpo.train.run_directory import RunDirectory, open_run_directory
from megatron_idpo.train.setup import Prepared, prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SteppedRun:
    """What all steps share."""

    config: RunConfig
    world: World
    output: RunDirectory
    pairs: RunPairs
    first: FrozenModel
    """The first model, with the configured adapter if there is one."""

    scores: RunCaches
    """Of the first model without that adapter."""

    curriculum: Curriculum
    manifest: ManifestFile

    @property
    def sdpo(self) -> SdpoConfig:
        """The section `sdpo`."""
        return _sdpo(self.config)


def train_in_steps(config: RunConfig, callbacks: Sequence[Callback] = ()) -> int:
    """Train all steps that are not complete, or only the step `sdpo.only`.

    Args:
        config: of the run.
        callbacks: receive the events of each step's run.

    Returns:
        0 if they are complete; `EXIT_PREEMPTED` if a signal stopped one, after saving.

    Raises:
        UserError: on every rank; complete steps and checkpoints of others still exist.
    """
    with (
        catch_stop_signals() as stop_flag,
        distributed_world(config) as world,
        open_run_directory(Path(config.training.output)) as output,
    ):
        if waits_for_other_machines(config, world):
            return EXIT_PREEMPTED
        check_can_push(config, output)
        try:
            run = assemble_steps(config, world, output, stop_flag)
        except RunStopped:
            return preempted_before_training(show=world.is_first)
        for number in steps_to_train(run):
            run.manifest.delete_unneeded(run.sdpo)
            # A signal between steps: ranks must agree, or some would enter the next step.
            if any(all_gather_objects(stop_flag.stop_requested)):
                return preempted_before_training(show=world.is_first)
            if train_step(run, number, stop_flag, callbacks) == EXIT_PREEMPTED:
                return EXIT_PREEMPTED
            # The models are in reference cycles: free their memory for the next step now.
            gc.collect()
        run.manifest.delete_unneeded(run.sdpo)
        report_steps(output, run.manifest.manifest, show=world.is_first)
        if world.is_first:
            for line in missing_exports(config, output.root, run.manifest.manifest):
                logger.info(line)
    return 0


def assemble_steps(
    config: RunConfig, world: World, output: RunDirectory, stop_flag: StopFlag
) -> SteppedRun:
    """Check everything, score the first model, assign the pairs, open the manifest. Collective.

    Raises:
        UserError: on every rank.
        RunStopped: on every rank; a signal came while the first model was scored.
    """
    prepared, sdpo = prepare(config, world), _sdpo(config)
    first, model, pairs = prepared.start, prepared.reference, prepared.pairs
    numbers = range(1, len(sdpo.steps) + 1)
    with raise_on_all_ranks("checking the steps"):
        check_can_start(config, output)
        for number in numbers:
            check_step(config, number, model, world.size)
    scores = score_first_model(config, world, model, pairs, stop_flag)
    curriculum = build_curriculum(config, scores, pairs.train)
    with raise_on_all_ranks("checking the steps' pairs"):
        for number in numbers:
            check_fills_a_batch(config, number, len(curriculum.slices[number - 1]))
    num_layers = model.source.architecture.num_layers
    planned = Manifest(
        model=config.model.path,
        model_identity=first.identity,
        target=sdpo.target,
        adapters=None if config.lora is None else sdpo.adapters,
        accuracy=curriculum.accuracy(),
        steps=tuple(_planned(config, number, pairs, curriculum, num_layers) for number in numbers),
    )
    # Before anything is written: it raises if the directory belongs to another run.
    manifest = ManifestFile(output.root, planned)
    with raise_on_all_ranks("writing the configuration and the curriculum"):
        if world.is_first:
            output.write_config(config.dump())
            write_curriculum(curriculum, output.root / TABLE)
    return SteppedRun(config, world, output, pairs, first, scores, curriculum, manifest)


def steps_to_train(run: SteppedRun) -> list[int]:
    """Numbers of the steps that are not complete, in order; only `sdpo.only` if it is set."""
    steps, only = run.manifest.manifest.steps, run.sdpo.only
    return [
        number
        for number, step in enumerate(steps, start=1)
        if step.state != "complete" and only in (None, number)
    ]


def train_step(
    run: SteppedRun, number: int, stop_flag: StopFlag, callbacks: Sequence[Callback]
) -> int:
    """Train or resume one step and write its snapshot. Collective.

    Returns:
        0 if it is complete; `EXIT_PREEMPTED` if a signal stopped it, after saving.

    Raises:
        UserError: on every rank; a snapshot is not the one in the manifest, or as `train`.
    """
    config, num_steps = step_config(run.config, number), len(run.manifest.manifest.steps)
    start, reference = models_of_step(run, number)
    run.manifest.mark_training(number, start, reference, config.layout.model_dump(mode="json"))
    slice_K = run.curriculum.slices[number - 1]
    pairs = RunPairs(
        run.pairs.train.select(slice_K),
        run.pairs.eval,
        run.pairs.tokenizer,
        run.pairs.train_report,
        run.pairs.eval_report,
    )
    if run.world.is_first:
        logger.info("\nsDPO step %d of %d: %s pairs", number, num_steps, f"{len(pairs.train):,}")
    if reference.identity == run.scores.model.identity and config.reference.source == "cache":
        with raise_on_all_ranks("finding the reference cache"):
            caches = RunCaches.of(config, pairs, reference)
        # The reference is the first model, whose scores are known: select, do not score again.
        caches.copy_from(run.scores, slice_K)
    is_last = number == num_steps
    finalize = StepFinalizer(
        config=run.config,
        manifest=run.manifest,
        number=number,
        first_eval=run.scores.open()[-1] if run.pairs.eval is not None else None,
        carries_adapter=run.config.lora is not None and run.sdpo.adapters == "carry",
        is_on_first_model=start.base_identity == run.first.base_identity,
        result=run.output.root if is_last and run.config.training.export else None,
    )
    prepared = Prepared(pairs, start, reference)
    with open_run_directory(Path(config.training.output)) as output:
        return train_prepared(
            *(config, run.world, output, prepared, stop_flag),
            finalize=finalize,
            callbacks=callbacks,
        )


def models_of_step(run: SteppedRun, number: int) -> tuple[FrozenModel, FrozenModel]:
    """Start and reference of a step; every byte of a snapshot is checked. Collective.

    The first step's reference is the first model without its adapter, as in a run without sdpo.

    Raises:
        CheckpointError: on every rank; the snapshot of the step before is missing or changed.
    """
    if number == 1:
        return run.first, run.scores.model
    previous = run.manifest.manifest.step(number - 1)
    assert previous.snapshot is not None and not previous.is_removed, "the newest one is kept"
    directory = snapshot_directory(run.output.root, number - 1)
    reference = open_snapshot(directory, previous.snapshot, run.scores.model)
    return (run.first if run.sdpo.target == "first" else reference), reference


def _sdpo(config: RunConfig) -> SdpoConfig:
    assert config.sdpo is not None
    return config.sdpo


def _planned(
    config: RunConfig, number: int, pairs: RunPairs, curriculum: Curriculum, num_layers: int
) -> StepRecord:
    """Record of a step that has not begun."""
    step, slice_K = step_config(config, number), curriculum.slices[number - 1]
    sections = step.model_dump(mode="json")
    sections["objective"]["layers"] = list(step_layers(config, number, num_layers))
    if sections["lora"] is not None:
        del sections["lora"]["adapter"]  # a path; its content is part of the start's identity
    learned = {
        f"{section}.{name}": value
        for section in ("objective", "lora")
        for name, value in (sections[section] or {}).items()
    }
    return StepRecord(
        pairs=len(slice_K),
        data=pairs.train.select(slice_K).fingerprint,
        sources=curriculum.source_counts(number),
        learnt={"model.dtype": config.model.dtype, **learned},
    )
