"""The first model's scores of a run of several steps, made ahead of training."""

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.model_source import open_model
from megatron_idpo.mcore.parallel.world import joined_world, raise_on_all_ranks
from megatron_idpo.reference.score_command import score
from megatron_idpo.sdpo.curriculum import first_models_remedies, scoring_config


def score_for_steps(config: RunConfig) -> int:
    """Compute `OUTPUT/first_model` at every layer that any step reads, or what is missing of it.

    Returns:
        0 when it is complete, `EXIT_PREEMPTED` when a signal ended it early, saved.

    Raises:
        UserError: on every rank; parts that were written before are there.
    """
    with joined_world(), first_models_remedies():
        with raise_on_all_ranks("looking at the model"):
            num_layers = open_model(config.model.path).architecture.num_layers
            scored = scoring_config(config, num_layers)
        return score(scored)
