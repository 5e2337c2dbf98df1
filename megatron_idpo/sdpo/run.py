"""Stepwise DPO from a configuration to the last step's model: `train_in_steps` is the whole of it.

    OUTPUT/
      manifest.json        what has become of each step   first_model/   the first model's scores
      step-1/ ...          an ordinary run's directory    snapshots/     each step's result
      curriculum.parquet   which pair went where          hf/, adapter/  the last step's result
      curriculum.md .png   the report over all steps      metrics.jsonl, curves.png: of all steps

Each step is an ordinary run (`train/loop.py`) on its slice of the pairs, from the model and against
the reference that the step before has left. Whenever it is killed, the same command goes on, with
the first step that the manifest does not call complete. Everything happens on every rank.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.errors import EXIT_PREEMPTED
from megatron_idpo.mcore.parallel.signals import StopFlag, Stopped, listening
from megatron_idpo.mcore.parallel.world import World, gathered, joined_world, raise_on_all_ranks
from megatron_idpo.reference.cached import Cached
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.sdpo.compatibility import check_fills_a_batch, check_step, refuse_to_go_on
from megatron_idpo.sdpo.curriculum import (
    TABLE,
    Curriculum,
    deal_pairs,
    score_first_model,
    step_layers,
    write_curriculum,
)
from megatron_idpo.sdpo.finalize_step import Conclusion
from megatron_idpo.sdpo.manifest import Manifest, StepRecord
from megatron_idpo.sdpo.manifest_file import ManifestFile
from megatron_idpo.sdpo.missing_exports import missing_exports
from megatron_idpo.sdpo.report import report_steps
from megatron_idpo.sdpo.retention import snapshot_directory
from megatron_idpo.sdpo.snapshot import open_snapshot
from megatron_idpo.train.loop import train_prepared
from megatron_idpo.train.messages import tell_stopped
from megatron_idpo.train.run_directory import RunDirectory, opened
from megatron_idpo.train.trainer import Prepared, prepare


@dataclass(frozen=True, slots=True)
class SteppedRun:
    """What all steps share."""

    config: RunConfig
    world: World
    output: RunDirectory
    pairs: RunPairs
    first: FrozenModel
    """The first model, with its adapter if one was given."""

    scores: RunCaches
    """The first model's, without its adapter."""

    curriculum: Curriculum
    manifest: ManifestFile


def train_in_steps(config: RunConfig) -> int:
    """Train all steps that are not complete, or the one that `sdpo.only` names.

    Returns:
        0 when they are complete, `EXIT_PREEMPTED` when a signal ended one early, saved.

    Raises:
        UserError: on every rank; complete steps and what was saved of others are there.
    """
    with (
        listening() as stop_flag,
        joined_world() as world,
        opened(Path(config.training.output)) as output,
    ):
        try:
            run = assemble_steps(config, world, output, stop_flag)
        except Stopped:
            tell_stopped(show=world.is_first)
            return EXIT_PREEMPTED
        for number in steps_to_train(run):
            run.manifest.clean(sdpo_of(config))
            if any(gathered(stop_flag.is_there)):
                tell_stopped(show=world.is_first)
                return EXIT_PREEMPTED
            if train_step(run, number, stop_flag) == EXIT_PREEMPTED:
                return EXIT_PREEMPTED
            gc.collect()  # models hold themselves in circles, and the next step needs the memory
        run.manifest.clean(sdpo_of(config))
        report_steps(output, run.manifest.manifest, show=world.is_first)
        if world.is_first:
            for line in missing_exports(config, output.root, run.manifest.manifest):
                print(line, flush=True)
    return 0


def assemble_steps(
    config: RunConfig, world: World, output: RunDirectory, stop_flag: StopFlag
) -> SteppedRun:
    """Look at everything, score the first model, deal the pairs, open the manifest. Collective.

    Raises:
        UserError: on every rank.
        Stopped: on every rank; a signal came while the first model was scored.
    """
    prepared = prepare(config, world)
    first, model = prepared.start, prepared.reference
    sdpo, pairs = sdpo_of(config), prepared.pairs
    numbers = range(1, len(sdpo.steps) + 1)
    with raise_on_all_ranks("looking at the steps"):
        refuse_to_go_on(config, output)
        for number in numbers:
            check_step(config, number, model, world.size)
    scores = score_first_model(config, world, model, pairs, stop_flag)
    curriculum = deal_pairs(config, scores, pairs.train)
    with raise_on_all_ranks("looking at the steps' pairs"):
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
    manifest = ManifestFile(output.root, planned)  # refuses what would be another run
    with raise_on_all_ranks("writing the configuration and the curriculum"):
        if world.is_first:
            output.write_config(config.dump())
            write_curriculum(curriculum, output.root / TABLE)
    return SteppedRun(config, world, output, pairs, first, scores, curriculum, manifest)


def steps_to_train(run: SteppedRun) -> list[int]:
    """The numbers of the steps that are not complete, in order; of `sdpo.only`, if that is one."""
    steps, only = run.manifest.manifest.steps, sdpo_of(run.config).only
    return [
        number
        for number, step in enumerate(steps, start=1)
        if step.state != "complete" and only in (None, number)
    ]


def train_step(run: SteppedRun, number: int, stop_flag: StopFlag) -> int:
    """Train one step, from where it stands to its snapshot. Collective.

    Returns:
        0 when it is complete, `EXIT_PREEMPTED` when a signal ended it early, saved.

    Raises:
        UserError: on every rank; a snapshot is not what the manifest names, or as `train`.
    """
    config, last = step_config(run.config, number), len(run.manifest.manifest.steps)
    start, reference = models_of_step(run, number)
    run.manifest.begun(number, start, reference, config.layout.model_dump(mode="json"))
    slice_K = run.curriculum.slices[number - 1]
    pairs = RunPairs(
        run.pairs.train.select(slice_K),
        run.pairs.eval,
        run.pairs.tokenizer,
        run.pairs.train_report,
        run.pairs.eval_report,
    )
    if run.world.is_first:
        print(f"\nsDPO step {number} of {last}: {len(pairs.train):,} pairs", flush=True)
    if reference.identity == run.scores.model.identity and config.reference.source == "cache":
        with raise_on_all_ranks("finding the reference cache"):
            caches = RunCaches.of(config, pairs, reference)
        caches.take_from(run.scores, slice_K)
    sdpo = sdpo_of(run.config)
    conclusion = Conclusion(
        manifest=run.manifest,
        number=number,
        first_eval=_first_eval(run),
        carries_adapter=run.config.lora is not None and sdpo.adapters == "carry",
        is_on_first_model=start.base_identity == run.first.base_identity,
        result=run.output.root if number == last and run.config.training.export else None,
    )
    with opened(Path(config.training.output)) as directory:
        return train_prepared(
            config,
            run.world,
            directory,
            Prepared(pairs, start, reference),
            stop_flag,
            conclude=conclusion,
        )


def models_of_step(run: SteppedRun, number: int) -> tuple[FrozenModel, FrozenModel]:
    """What a step's policy starts from, and its reference; every byte of a snapshot is checked.

    Collective. The first step's reference is the first model without the adapter that it may have
    been given, as in a run of one step.

    Raises:
        CheckpointError: on every rank; the snapshot of the step before is not there, or has been
            changed.
    """
    if number == 1:
        return run.first, run.scores.model
    before = run.manifest.manifest.step(number - 1)
    directory = snapshot_directory(run.output.root, number - 1)
    assert before.snapshot is not None and not before.is_removed, "the newest one stays"
    reference = open_snapshot(directory, before.snapshot, run.scores.model)
    if sdpo_of(run.config).target == "first":
        return run.first, reference
    return reference, reference


def sdpo_of(config: RunConfig) -> SdpoConfig:
    """The section, which is there."""
    assert config.sdpo is not None
    return config.sdpo


def _planned(
    config: RunConfig, number: int, pairs: RunPairs, curriculum: Curriculum, num_layers: int
) -> StepRecord:
    """A step that has not begun."""
    step, slice_K = step_config(config, number), curriculum.slices[number - 1]
    dumped = step.model_dump(mode="json")
    dumped["objective"]["layers"] = list(step_layers(config, number, num_layers))
    if dumped["lora"] is not None:
        del dumped["lora"]["adapter"]  # a path; what it holds is in the first model's identity
    learnt = {
        f"{section}.{name}": value
        for section in ("objective", "lora")
        for name, value in (dumped[section] or {}).items()
    }
    return StepRecord(
        pairs=len(slice_K),
        data=pairs.train.select(slice_K).fingerprint,
        sources=curriculum.source_counts(number),
        learnt={"model.dtype": config.model.dtype, **learnt},
    )


def _first_eval(run: SteppedRun) -> Cached | None:
    """The first model's log-probabilities of the held-out pairs."""
    return run.scores.open()[-1] if run.pairs.eval is not None else None
