"""Checks of an sDPO run before the first model is scored or a step is trained.

Not collective; call within `raise_on_all_ranks`.
"""

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.sdpo.manifest import FILE, SNAPSHOTS, read_manifest
from megatron_idpo.train.run_directory import RunDirectory
from megatron_idpo.train.setup import check_against_model


def check_can_start(config: RunConfig, output: RunDirectory) -> None:
    """Check the output directory, and that the steps before `sdpo.only` are complete.

    Raises:
        UserError: the directory belongs to another run, or `sdpo.only` is too early.
    """
    assert config.sdpo is not None
    manifest, only = read_manifest(output.root), config.sdpo.only
    next_step = manifest.next_step if manifest else 1
    if only is not None and next_step is not None and only > next_step:
        message = f"is {only}, but step {next_step} is not complete"
        raise ConfigError.at("sdpo.only", message, f"run step {next_step} first, or leave it out")
    if manifest and config.checkpoint.resume == "never":
        message = f"already has a manifest: {output.root / FILE}"
        remedy = "name another directory, or set checkpoint.resume to auto to resume"
        raise ConfigError.at("training.output", message, remedy)
    if not manifest:
        # A run without sdpo has its results in the first two. Without its manifest, a run with
        # snapshots would train all of its steps again.
        for path in (output.checkpoints, output.hf, output.root / SNAPSHOTS):
            if path.exists():
                message = f"has {path} but no {FILE}: of a run without sdpo, or the file is lost"
                remedy = "name another directory, or restore the file"
                raise ConfigError.at("training.output", message, remedy)


def check_step(config: RunConfig, number: int, model: FrozenModel, world_size: int) -> None:
    """Check a step's configuration against the model; problems are located in the step.

    Raises:
        ConfigError: with every problem.
    """
    try:
        check_against_model(step_config(config, number), model.source.architecture, world_size)
    except ConfigError as error:
        step = f"sdpo.steps.{number - 1}"
        raise ConfigError.of(
            [Problem(f"{step}: {p.location}", p.message, p.remedy) for p in error.problems]
        ) from None


def check_fills_a_batch(config: RunConfig, number: int, pairs: int) -> None:
    """Check that a step has enough pairs for one optimizer step.

    Raises:
        DataError: it does not.
    """
    training = step_config(config, number).training
    if training.epochs * pairs < training.global_batch_pairs:
        message = f"has {pairs} pairs in {training.epochs} epochs, fewer than a batch of "
        remedy = "give it more pairs or epochs, or lower training.global_batch_pairs"
        location = f"sdpo.steps.{number - 1}"
        raise DataError.at(location, f"{message}{training.global_batch_pairs}", remedy)
