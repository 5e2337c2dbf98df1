"""The reference of a run: found before weights are read, computed before the first step.

An existing cache is checked first, so that one of another model or other data is rejected at once.
An incomplete cache is computed by the policy before its first step, if policy and reference share
their weights then (with adapters on or off); otherwise by a second model, which is freed before the
first step.
"""

import gc

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.model_source import FrozenModel
from megatron_idpo.data.packing.batches import RowSettings
from megatron_idpo.data.run_pairs import RunPairs
from megatron_idpo.mcore.parallel.world import RunStopped, StopFlag, is_rank0, raise_on_all_ranks
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


def prepare_references(
    config: RunConfig,
    policy: Policy,
    model: FrozenModel,
    caches: RunCaches | None,
    rows: RowSettings,
    stop_flag: StopFlag,
) -> tuple[Reference, Reference]:
    """The references of the training and of the held-out pairs. Collective.

    Incomplete caches are computed. A live reference serves both sets of pairs; a cache is indexed
    by the pairs of its set.

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
        return live, live
    if not caches.are_complete():
        is_complete = caches.score(_scorer(config, policy, model), rows, stop_flag)
        # A second model is in reference cycles: without this its memory stays in use.
        gc.collect()
        if not is_complete:
            raise RunStopped
    opened = caches.open()
    return opened[0], opened[-1]


def _scorer(config: RunConfig, policy: Policy, model: FrozenModel) -> Reference:
    """The model that computes a cache; a function, so that no local keeps a second model alive."""
    inside = reference_in_policy(policy, model)
    if inside is not None:
        return inside
    chunks, dpo = frozen_model(config, model, show_progress=is_rank0())
    return Resident(dpo, chunks)


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
