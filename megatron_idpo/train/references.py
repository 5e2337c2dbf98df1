"""The reference of a run: found before weights are read, computed before the first step.

An existing cache is checked first, so that one of another model or other data is rejected at once.
An incomplete cache is computed by the policy before its first step, if policy and reference share
their weights then (with adapters on or off); otherwise by a second model, which is freed before the
first step.
"""

import gc
from dataclasses import dataclass

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.mcore.parallel.world import (
    RunStopped,
    StopFlag,
    is_rank0,
    raise_on_all_ranks,
)
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.reference.sources import (
    AdapterOff,
    NoReference,
    Offloaded,
    Reference,
    Resident,
    frozen_model,
)
from megatron_idpo.train.policy import Policy


@dataclass(frozen=True, slots=True)
class References:
    """One reference for both sets of pairs; a cache is indexed by the pairs of its set."""

    train: Reference
    eval: Reference
    """Of the held-out pairs, if there are any."""


def find_caches(config: RunConfig, model: FrozenModel, pairs: RunPairs) -> RunCaches | None:
    """Check the caches that a run reads, complete or not. Collective.

    Args:
        config: of the run.
        model: the reference.
        pairs: of the run.

    Returns:
        None if `reference.source` is not `cache`.

    Raises:
        UserError: on every rank; a cache was made from other inputs.
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
    """Build the references of a run; compute its caches if they are incomplete. Collective.

    A resumed run calls this before its checkpoint is loaded, so that the policy still equals its
    start and a deleted cache can be computed again.

    Args:
        config: of the run.
        policy: at its start.
        model: the reference.
        caches: from `find_caches`.
        rows: how pairs are packed.
        stop_flag: whether this process has received a stop signal.

    Raises:
        UserError: on every rank.
        RunStopped: on every rank; a signal came while a cache was computed. What was scored is
            saved.
    """
    if caches is None:
        live = build_reference(config, policy, model, show_progress=is_rank0())
        return References(live, live)
    if not caches.are_complete():
        scorer = reference_in_policy(policy, model)
        if scorer is None:
            chunks, dpo = frozen_model(config, model, show_progress=is_rank0())
            scorer = Resident(dpo, chunks)
        is_complete = caches.score(scorer, rows, stop_flag)
        # A second model is in reference cycles: without this its memory stays in use.
        del scorer
        gc.collect()
        if not is_complete:
            raise RunStopped
    opened = caches.open()
    return References(opened[0], opened[-1])


def build_reference(
    config: RunConfig, policy: Policy, model: FrozenModel, *, show_progress: bool
) -> Reference:
    """Build a reference that is not a cache, loading a second model if needed. Collective.

    Raises:
        UserError: on every rank.
    """
    source = config.reference.source
    assert source != "cache", "a cache is read by RunCaches"
    if source == "none":
        return NoReference()
    if source == "adapter_off":
        assert policy.adapters is not None, "checked with the configuration"
        assert model.identity == policy.start.base_identity, "checked with the configuration"
        return AdapterOff(policy.dpo, policy.trainable.model, policy.adapters)
    chunks, dpo = frozen_model(config, model, show_progress=show_progress)
    return Offloaded(dpo, chunks) if source == "offloaded" else Resident(dpo, chunks)


def reference_in_policy(policy: Policy, model: FrozenModel) -> Reference | None:
    """The policy before its first step as the reference, which saves a second model.

    Returns:
        None if the policy starts from other weights.
    """
    if model.identity == policy.start.identity:
        # New adapters change nothing (B is zero); turned off, they also cost nothing.
        if policy.adapters is not None and model.adapter is None:
            return AdapterOff(policy.dpo, policy.trainable.model, policy.adapters)
        return Resident(policy.dpo, policy.trainable.model)
    if policy.adapters is not None and model.identity == policy.start.base_identity:
        return AdapterOff(policy.dpo, policy.trainable.model, policy.adapters)
    return None
