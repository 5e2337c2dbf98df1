"""The verb `score`: compute the reference cache of a configuration ahead of training."""

import logging

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.hf_io.hub import fetch_models, fetch_tokenizer
from megatron_idpo.convert.model_source import FrozenModel, ModelSource, open_model
from megatron_idpo.data.run_pairs import RunPairs, check_tokens, load_run_pairs, row_settings
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.mcore.parallel.world import (
    StopFlag,
    World,
    catch_stop_signals,
    distributed_world,
    raise_on_all_ranks,
    running_layout,
)
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.reference.sources import Resident, frozen_model

logger = logging.getLogger(__name__)


def score(config: RunConfig) -> int:
    """Compute the reference cache of a configuration, or the rest of it. Collective.

    Returns:
        0 when it is complete, `EXIT_PREEMPTED` when a signal ended it early; all scored pairs are
        saved then.

    Raises:
        UserError: on every rank; parts that were written before are kept.
    """
    with catch_stop_signals() as stop_flag, distributed_world(config) as world:
        (model_path,) = fetch_models([config.model.path])
        with raise_on_all_ranks("reading the model"):
            source = open_model(model_path)
            _check(config, source.architecture, world.size)
        tokenizer = fetch_tokenizer(config.model.tokenizer)
        with raise_on_all_ranks("reading the data"):
            pairs = load_run_pairs(config, model_path, tokenizer)
            check_tokens(pairs, source.architecture.vocab_size)
        with running_layout(config.layout):
            return _score(config, world, source, pairs, stop_flag)


def _score(
    config: RunConfig, world: World, source: ModelSource, pairs: RunPairs, stop_flag: StopFlag
) -> int:
    model = FrozenModel.of(source)
    with raise_on_all_ranks("finding the reference cache"):
        caches = RunCaches.of(config, pairs, model)
    is_complete = caches.are_complete()
    if not is_complete:
        chunks, dpo = frozen_model(config, model, show_progress=world.is_first)
        rows = row_settings(config, world.size, data_rank=rank_coordinates().data_rank)
        is_complete = caches.score(Resident(dpo, chunks), rows, stop_flag)
    if world.is_first and is_complete:
        layers = ", ".join(map(str, caches.parts[0].fingerprint.layers))
        counts = " and ".join(f"{len(part.pairs):,} {part.unit}" for part in caches.parts)
        logger.info("reference log-probs of %s at layers %s: %s", counts, layers, caches.directory)
    elif world.is_first:
        logger.info(
            "stopped by a signal; scored pairs are saved in %s; the same command resumes "
            "(exit code %d)",
            caches.directory,
            EXIT_PREEMPTED,
        )
    return 0 if is_complete else EXIT_PREEMPTED


def _check(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    """Check layout and layers against the model, and report all problems at once."""
    problems = list(config.layout.problems_for(architecture, world_size))
    try:
        resolve_layers(config.objective.layers, architecture.num_layers)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError.of(problems)
