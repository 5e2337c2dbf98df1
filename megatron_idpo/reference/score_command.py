"""Scoring from a configuration to a finished cache, as named steps, on every rank."""

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.convert.model_source import ModelSource, open_model
from megatron_idpo.data.run_pairs import RunPairs, check_tokens, load_run_pairs, row_settings
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError, Problem
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.mcore.parallel.signals import StopFlag, listening
from megatron_idpo.mcore.parallel.world import World, joined_world, raise_on_all_ranks, running
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.reference.frozen import frozen_model
from megatron_idpo.reference.live import Resident
from megatron_idpo.reference.run_caches import RunCaches


def score(config: RunConfig) -> int:
    """Compute the reference cache of a configuration, or what is missing of it.

    Returns:
        0 when it is complete, `EXIT_PREEMPTED` when a signal ended it early, saved.

    Raises:
        UserError: on every rank; parts that were written before are there.
    """
    with listening() as stop_flag, joined_world() as world:
        with raise_on_all_ranks("looking at the model"):
            source = open_model(config.model.path)
            _check(config, source.architecture, world.size)
        with raise_on_all_ranks("reading the data"):
            pairs = load_run_pairs(config)
            check_tokens(pairs, source.architecture.vocab_size)
        with running(config.layout.layout()):
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
        rows = row_settings(config, world.size, data_rank=this_rank().data)
        is_complete = caches.score(Resident(dpo, chunks), rows, stop_flag)
    if world.is_first:
        print(_describe(caches, is_complete=is_complete), flush=True)
    return 0 if is_complete else EXIT_PREEMPTED


def _check(config: RunConfig, architecture: Architecture, world_size: int) -> None:
    """Refuse what this model and this world cannot do, all at once."""
    found: list[Problem] = list(config.layout.layout().problems(architecture, world_size))
    try:
        resolve_layers(config.objective.layers, architecture.num_layers)
    except ConfigError as error:
        found += error.problems
    if found:
        raise ConfigError.of(found)


def _describe(caches: RunCaches, *, is_complete: bool) -> str:
    """Where the cache is, or how to go on."""
    if is_complete:
        layers = ", ".join(map(str, caches.parts[0].fingerprint.layers))
        counts = " and ".join(f"{len(part.pairs):,} {part.what}" for part in caches.parts)
        return f"reference log-probabilities of {counts} at layers {layers}: {caches.directory}"
    return (
        f"stopped by a signal, what was scored is saved in {caches.directory}; the same command "
        f"goes on from there (exit code {EXIT_PREEMPTED})"
    )
