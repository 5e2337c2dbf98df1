"""What a run's policy is compared to: looked for before a weight is read, computed before step 1.

A cache is looked for first, so that one of another model or other data is refused at once. Where it
is not complete, the policy itself computes it before it learns anything, if it is the reference
then, with its adapters on or off; else a second model does, which is gone before the first step.
"""

import gc
from dataclasses import dataclass

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.mcore.parallel.signals import StopFlag, Stopped
from megatron_idpo.mcore.parallel.world import is_first_rank, raise_on_all_ranks
from megatron_idpo.reference.frozen import frozen_model
from megatron_idpo.reference.live import Reference, Resident
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.train.build import Policy, build_reference, reference_in_policy


@dataclass(frozen=True, slots=True)
class References:
    """The same reference for both sets of pairs, each by its own indices."""

    train: Reference
    eval: Reference
    """Of the held-out pairs, if there are any."""


def find_caches(
    config: RunConfig,
    model: FrozenModel,
    pairs: RunPairs,
) -> RunCaches | None:
    """The caches that a run reads, complete or still to be made. Collective.

    Args:
        config: of the run.
        model: the reference.
        pairs: of the run.

    Returns:
        None where `reference.source` is no cache.

    Raises:
        UserError: on every rank; a cache is of something else.
    """
    if config.reference.source != "cache":
        return None
    with raise_on_all_ranks("finding the reference cache"):
        caches = RunCaches.of(config, pairs, model)
    caches.are_complete()
    return caches


def resolve_references(
    config: RunConfig,
    policy: Policy,
    model: FrozenModel,
    caches: RunCaches | None,
    rows: RowSettings,
    stop_flag: StopFlag,
) -> References:
    """The references of a run whose policy is at its start, also where it goes on. Collective.

    A cache that is gone meanwhile is computed again: model and data are known by their bytes.

    Args:
        config: of the run.
        policy: as it starts.
        model: the reference.
        caches: what `find_caches` found.
        rows: how pairs are laid out.
        stop_flag: whether this process has been asked to stop.

    Raises:
        UserError: on every rank.
        Stopped: on every rank; a signal came while a cache was made. What was scored is saved.
    """
    if caches is None:
        live = build_reference(config, policy, model, show_progress=is_first_rank())
        return References(live, live)
    if not caches.are_complete():
        is_complete = caches.score(_scorer(config, policy, model), rows, stop_flag)
        gc.collect()  # a second model, if there was one, holds itself in circles
        if not is_complete:
            raise Stopped
    opened = caches.open()
    return References(opened[0], opened[-1])


def _scorer(config: RunConfig, policy: Policy, model: FrozenModel) -> Reference:
    """What computes a cache: the policy itself where it has not left the reference yet."""
    inside = reference_in_policy(policy, model)
    if inside is not None:
        return inside
    chunks, dpo = frozen_model(config, model, show_progress=is_first_rank())
    return Resident(dpo, chunks)
