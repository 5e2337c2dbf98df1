"""Reference log-probabilities for `pretrain()`: of the model that training starts from.

`pretrain()` builds its data iterators after it has loaded the weights, so at iteration 0 the model
is the reference: its log-probabilities are computed with forward passes and kept in a cache
(`reference/cache.py`). At a later iteration the weights are trained; then only the cache will do.

    P  pairs   L  layers   b  pairs of a step   2 = chosen, rejected
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_idpo.console.progress import show_progress
from megatron_idpo.data.pairs import PairSource
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.model.build import global_expert_biases, global_parameters
from megatron_idpo.mcore.parallel.groups import ModelGroups, rank_coordinates
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    is_rank0,
    raise_on_all_ranks,
    read_on_rank0,
)
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.reference.cache import (
    CacheWriter,
    is_complete,
    lock_cache,
    open_cache,
    read_fingerprint,
)
from megatron_idpo.reference.fingerprint import Fingerprint
from megatron_idpo.reference.logps_table import Logps

PREFIX = "megatron-lm:"
"""Begins the identity of weights in caches of this module; those of `score` have none."""

_DIGEST_ELEMENTS = 1 << 24
"""Elements that are widened to int64 at a time: 128 MiB."""

type ScoreStep = Callable[[Sequence[Sequence[int]]], list[LayerOutput]]
"""The outputs of this rank's layers for its micro-batches of pairs. Collective."""


def reference_logps(
    cache: Path,
    required: Fingerprint,
    *,
    iteration: int,
    compute: Callable[[], Logps],
    weights_identity: Callable[[], str],
) -> Logps:
    """Read the cache, or fill it at iteration 0. Collective over the world.

    Args:
        cache: its directory.
        required: of the pairs, the layers and the settings; `weights` is filled in here.
        iteration: of the loaded checkpoint.
        compute: scores all pairs with the current weights. Collective.
        weights_identity: of the current weights. Collective.

    Raises:
        CheckpointError: on every rank. The cache was made from other pairs, layers or weights; or
            there is none at a later iteration.
    """
    # Only rank 0 looks, as in `reference/run_caches.py`.
    saved = read_on_rank0("opening the reference cache", lambda: read_fingerprint(cache))
    if iteration == 0:
        required = replace(required, weights=PREFIX + weights_identity())
    if saved is not None and not saved.weights.startswith(PREFIX):
        # Made by `score`: of weights and by settings that only its user can compare with these.
        required = replace(saved, data=required.data, pairs=required.pairs, layers=required.layers)
    elif saved is not None and iteration > 0:
        required = replace(required, weights=saved.weights)

    def check() -> bool:
        exists = is_complete(cache, required)
        if not exists and iteration > 0:
            message = f"has no complete cache, and the weights of iteration {iteration} are trained"
            remedy = (
                "give the cache that the run wrote at iteration 0, or make it again: start once "
                "from the initial weights with --train-iters 0 --finetune and the same cache"
            )
            raise CheckpointError.at(str(cache), message, remedy)
        return exists

    if not read_on_rank0("opening the reference cache", check):
        _write(cache, required, compute())
    return read_on_rank0("reading the reference cache", lambda: open_cache(cache, required))


def _write(cache: Path, fingerprint: Fingerprint, logps_PL2: Logps) -> None:
    with raise_on_all_ranks("writing the reference cache"), ExitStack() as stack:
        if is_rank0():
            stack.enter_context(lock_cache(cache))
            writer = CacheWriter(cache, fingerprint)
            writer.add(logps_PL2[writer.done_pairs :])
            writer.finish()


def score(
    steps: Iterator[list[list[int]]],
    score_step: ScoreStep,
    *,
    num_pairs: int,
    step_pairs: int,
    layers: Sequence[int],
    groups: ModelGroups,
) -> Logps:
    """Log-probabilities of all pairs, float32 [P, L, 2], on every rank. Collective over the world.

    Args:
        steps: this rank's micro-batches of every step; pairs may repeat at the end.
        score_step: of one step.
        num_pairs: P.
        step_pairs: of a step, over all data-parallel ranks.
        layers: the L layers.
        groups: of the model.
    """
    table_PL3 = torch.zeros(num_pairs, len(layers), 3, device=default_device())
    # Tensor-parallel ranks have the same values.
    is_counted = groups.tensor_rank == 0
    with show_progress("reference log-probs", num_pairs, unit="pairs", show=is_rank0()) as progress:
        for step in steps:
            for output in score_step(step):
                if is_counted and output.layer in layers:
                    at_b = torch.tensor(step[output.micro_batch], device=table_PL3.device)
                    # By assignment: a pair that repeats within the step counts once.
                    column = layers.index(output.layer)
                    table_PL3[at_b, column, :2] = output.logps_2P.view(-1, 2).float()
                    table_PL3[at_b, column, 2] = 1.0
            progress.update(min(num_pairs, progress.completed + step_pairs))
    dist.all_reduce(table_PL3)
    # The pairs that fill the last step may have been scored by two data-parallel ranks.
    logps_PL2: Logps = (table_PL3[..., :2] / table_PL3[..., 2:]).cpu().numpy()
    assert np.isfinite(logps_PL2).all(), "every pair and layer was scored"
    return logps_PL2


def data_identity(pairs: PairSource) -> str:
    """sha256 over the tokens of all pairs, in order."""
    known = getattr(pairs, "fingerprint", None)
    if isinstance(known, str):
        return known
    total = hashlib.sha256()
    for index in range(len(pairs)):
        pair = pairs[index]
        for tokens in (pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens):
            total.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i4").tobytes())
    return total.hexdigest()


def weights_identity(
    chunks: Sequence[Any], vocab_size: int, groups: ModelGroups, *, only_frozen: bool = False
) -> str:
    """A digest of the model's weights, equal in every parallel layout. Collective over the world.

    Bits are summed as integers: exact in any order, and sums of tensor-parallel shards add up.
    Each element is weighted by its index in the dimensions that are not sharded, so that most
    permutations change the digest. Padding rows of the vocabulary are left out; routers' expert
    biases, which are not parameters, are included.

    Args:
        chunks: this rank's.
        vocab_size: tokens of the vocabulary, without padding rows.
        groups: of the model, megatron-core's own.
        only_frozen: leave out parameters that are trained, as adapters are.
    """
    own = set()
    for name, parameter in global_parameters(chunks):
        if getattr(parameter, "shared", False) or (only_frozen and parameter.requires_grad):
            continue  # shared: the last stage's copy of a tied embedding
        shard = getattr(parameter, "partition_dim", -1)
        shard = shard if getattr(parameter, "tensor_model_parallel", False) else -1
        # Experts may be sharded over other ranks; all that hold a whole one have it as rank 0.
        tp_rank = groups.tensor_rank
        if ".mlp.experts." in name:
            tp_rank, _ = rank_coordinates().tp(is_expert=True)
        rank = tp_rank if shard >= 0 else 0
        weights = parameter.detach()
        if name.startswith(("embedding.word_embeddings.", "output_layer.")) and shard == 0:
            weights = weights[: max(0, vocab_size - rank * len(weights))]
        own.add((name, rank, _digest(weights, shard)))
    own |= {(name, 0, _digest(bias, -1)) for name, bias in global_expert_biases(chunks)}
    # A set: data-parallel ranks have the same entries, experts of other ranks have different ones.
    totals: dict[str, int] = {}
    for name, _, digest in sorted(set().union(*all_gather_objects(own))):
        totals[name] = (totals.get(name, 0) + digest) % (1 << 64)
    return hashlib.sha256(repr(sorted(totals.items())).encode()).hexdigest()


def _digest(weights: torch.Tensor, shard_dim: int) -> int:
    """The weighted sum of a tensor's bits."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    rows = max(1, _DIGEST_ELEMENTS * len(weights) // max(1, weights.numel()))
    total = 0
    for start in range(0, len(weights), rows):
        bits = weights[start : start + rows].contiguous().view(integer).to(torch.int64)
        for dim, size in enumerate(bits.shape):
            if dim != shard_dim:
                first = start if dim == 0 else 0
                odd = 2 * torch.arange(first, first + size, device=bits.device) + 1
                bits = bits * odd.view([-1 if d == dim else 1 for d in range(bits.dim())])
        total += int(bits.sum())
    return total
