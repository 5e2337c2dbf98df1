"""What can be known to go wrong with steps before the first model is scored, or a step is trained.

Not collective; call within `raise_on_all_ranks`.
"""

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.sdpo.manifest import FILE, read_manifest
from megatron_idpo.train.checks import check_against_model
from megatron_idpo.train.run_directory import RunDirectory


def refuse_to_go_on(config: RunConfig, output: RunDirectory) -> None:
    """Refuse to go on where a new run was wanted, and a step whose turn has not come.

    Raises:
        UserError: naming which.
    """
    assert config.sdpo is not None
    found, only = read_manifest(output.root), config.sdpo.only
    following = found.next_step if found else 1
    if only is not None and following is not None and only > following:
        message = f"is {only}, but step {following} is not complete"
        raise ConfigError.at("sdpo.only", message, f"run step {following} first, or leave it out")
    if found is None:
        _refuse_plain_run(output)
    if config.checkpoint.resume == "never" and found:
        message = f"has a manifest already: {output.root / FILE}"
        remedy = "name another directory, or set checkpoint.resume to auto to go on from it"
        raise ConfigError.at("training.output", message, remedy)


def _refuse_plain_run(output: RunDirectory) -> None:
    """A run of one step has its result here."""
    for path in (output.checkpoints, output.hf):
        if path.exists():
            message = f"there is {path}, but no {FILE}: a run of one step's, or that was lost"
            raise ConfigError.at(
                "training.output", message, "name another directory, or put it back"
            )


def check_step(config: RunConfig, number: int, model: FrozenModel, world_size: int) -> None:
    """A step's configuration against the model and the world, told with the step's number."""
    try:
        check_against_model(step_config(config, number), model.source.architecture, world_size)
    except ConfigError as error:
        location = f"sdpo.steps.{number - 1}"
        raise ConfigError.of(
            [
                Problem(f"{location}: {each.location}", each.message, each.remedy)
                for each in error.problems
            ]
        ) from None


def check_fills_a_batch(config: RunConfig, number: int, pairs: int) -> None:
    """A step has to have pairs for one optimizer step, which would be told hours later."""
    training = step_config(config, number).training
    if training.epochs * pairs < training.global_batch_pairs:
        message = f"has {pairs} pairs in {training.epochs} epochs, fewer than a batch of "
        remedy = "give it more pairs or epochs, or lower training.global_batch_pairs"
        location = f"sdpo.steps.{number - 1}"
        raise DataError.at(location, f"{message}{training.global_batch_pairs}", remedy)
