"""Start check: policy and reference must agree at every layer before the first step.

If both start from the same weights and are read at the same layers, every log-probability ratio is
0 and every layer's loss is the objective's at 0 (ln 2 for `sigmoid`). With `reference_layer: final`
this holds for the final layer only. If they differ (another base model under the adapter, a damaged
copy of the head, dropout that is on), the run would learn the difference of two models instead of
preferences. The check is one forward pass over the first rows of the first batch, with dropout off:
rows as in training, so that what rounds alike is equal.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_idpo.config.objective import Objective
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.packing.batches import RowSettings, build_batch
from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import TrainingError
from megatron_idpo.mcore.parallel.world import all_gather_objects
from megatron_idpo.objective.dpo import loss_at_zero, preference_loss
from megatron_idpo.plugin.batch_run import run_batch
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.train.step import TrainStep

FP32_LOGP_TOLERANCE = 5e-5
"""fp32: of a sequence's log-probability, in nats per token. SmolLM2-135M, 16 pairs of up to 96
tokens, packed with and without shared prompts: 5e-6 at most at any of four layers. The loss is not
compared, because its rounding (1e-6 there) grows with beta and the length of answers."""

BF16_LOGP_TOLERANCE = 0.02
"""bf16, live reference: the same kernels on the same rows, so the expected difference is 0."""

CACHED_BF16_LOGP_TOLERANCE = 0.2
"""bf16, cache, which may have been computed in another layout or for other batches (of the same run
it is exact). For the same 16 pairs on a CPU, with and without shared prompts, hidden states differ
in their last bits, and log-probabilities by 0.015 per token on average and 0.07 at most."""


def is_start_check_due(config: RunConfig, *, starts_at_reference: bool) -> bool:
    """Whether the check is enabled, and policy and reference start equal."""
    return config.training.start_check and config.reference.source != "none" and starts_at_reference


def check_start(
    train_step: TrainStep,
    pairs: PairDataset,
    rows: RowSettings,
    *,
    seed: int,
    global_batch_pairs: int,
) -> tuple[float, float]:
    """Compare policy and reference on a row of each rank of the first batch. Collective.

    Args:
        train_step: with policy and reference.
        pairs: to train on.
        rows: how pairs are packed.
        seed: of their order.
        global_batch_pairs: of a training step.

    Returns:
        The largest difference of a log-probability over all compared layers, and its bound, in nats
        per token.

    Raises:
        TrainingError: on every rank; they differ by more than rounding at some layer.
    """
    policy, objective = train_step.policy, train_step.objective
    count = min(len(pairs), global_batch_pairs)
    index_B = stream_pairs(0, count, num_pairs=len(pairs), seed=seed)
    batch = build_batch(pairs, index_B, rows, consumed_pairs=0)
    # Rows by decreasing attention cost: the first is never empty while the rank has pairs.
    batch = replace(batch, rows=batch.rows[: rows.rows_multiple])
    reference_logps = train_step.reference.logps(batch)
    outputs = run_batch(policy.dpo, policy.trainable.model, batch, reference_logps)
    if objective.reference_layer == "final":
        outputs = [output for output in outputs if output.layer == policy.dpo.num_layers]
    # Each rank has the layers of its stage and the pairs of its data-parallel rank.
    by_rank = all_gather_objects(_compare(outputs, objective))
    losses, differences = {}, {}
    for layer in sorted({layer for rank in by_rank for layer in rank}):
        parts = [rank[layer] for rank in by_rank if layer in rank]
        losses[layer] = sum(loss for loss, _, _ in parts) / sum(count for _, _, count in parts)
        differences[layer] = max(difference for _, difference, _ in parts)
    is_fp32 = policy.chunks[0].config.params_dtype == torch.float32
    needs_forward = train_step.reference.needs_forward
    bf16_tolerance = BF16_LOGP_TOLERANCE if needs_forward else CACHED_BF16_LOGP_TOLERANCE
    tolerance = FP32_LOGP_TOLERANCE if is_fp32 else bf16_tolerance
    bad_layers = [
        f"layer {layer} (loss {losses[layer]:.6f}, log-probs differ by {difference:.2g} nats/token)"
        for layer, difference in differences.items()
        if not difference <= tolerance  # also if it is NaN
    ]
    if bad_layers:
        raise TrainingError.at(
            "start check",
            "policy and reference should be equal before the first step (every layer's loss "
            f"{loss_at_zero(objective):.6f}), but differ at {', '.join(bad_layers)}",
            "they are not the same model; if this is intended, set training.start_check to false",
        )
    return max(differences.values()), tolerance


def _compare(
    outputs: Sequence[LayerOutput], objective: Objective
) -> dict[int, tuple[float, float, int]]:
    """By layer of this rank: sum of losses, largest difference per token, number of pairs."""
    by_layer: dict[int, tuple[float, float, int]] = {}
    for output in outputs:
        assert output.reference_logps_2P is not None and output.lengths_2P is not None
        per_token_2P = (output.logps_2P - output.reference_logps_2P) / output.lengths_2P
        # Without likelihood terms, which do not compare policy and reference.
        loss_P = preference_loss(
            output.logps_2P, output.reference_logps_2P, output.lengths_2P, objective, with_sft=False
        )
        total, largest, count = by_layer.get(output.layer, (0.0, 0.0, 0))
        difference = float(per_token_2P.abs().max()) if len(per_token_2P) else 0.0
        by_layer[output.layer] = (
            total + float(loss_P.double().sum()),
            max(largest, difference),
            count + len(loss_P),
        )
    return by_layer
