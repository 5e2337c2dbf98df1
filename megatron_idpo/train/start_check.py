"""Before the first step: do policy and reference agree at every layer?

Where both start equal and are read at the same layers, every Δ is 0 and every layer's loss is the
objective's at 0, ln 2 for `sigmoid`; with `reference_layer: final` the final layer's is. If it is
not, the run would learn the difference between two models instead of preferences: another base
under the adapter, a damaged copy of the head, dropout that is on. The check is a forward pass over
a few pairs, with dropout off.
"""

from collections.abc import Sequence

import torch

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.packing.batches import RowSettings, build_batch
from megatron_idpo.data.packing.epoch_order import stream_pairs
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import TrainingError
from megatron_idpo.mcore.parallel.world import gathered
from megatron_idpo.objective.dpo import Objective, loss_at_zero, preference_loss
from megatron_idpo.objective.settings import PER_TOKEN
from megatron_idpo.plugin.batch_run import run_batch
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.train.step import Trainer, response_lengths

PAIRS_PER_RANK = 2

FP32_LOGP_TOLERANCE = 5e-5
"""In fp32: of a sequence's log-probability, per token. SmolLM2-135M, 16 pairs of up to 96 tokens,
read with shared prompts and without: 5e-6 at most at any of four layers. The loss is no measure,
since its rounding (1e-6 there) grows with the length of answers and with beta."""

BF16_LOGP_TOLERANCE = 0.02
"""In bf16, of a live reference: the same kernels over the same rows, which differ by nothing."""

CACHED_BF16_LOGP_TOLERANCE = 0.2
"""In bf16, of a cache, which other shapes or another layout may have made. For the same 16 pairs on
a CPU, rows packed in another way give the same bits; without shared prompts the last bits of hidden
states differ, and a log-probability per token by 0.015 on average and 0.07 at most."""


def is_expected(config: RunConfig, *, starts_at_reference: bool) -> bool:
    """Whether policy and reference start equal."""
    return config.training.start_check and config.reference.source != "none" and starts_at_reference


def check_start(
    trainer: Trainer, pairs: PairDataset, rows: RowSettings, *, seed: int
) -> dict[int, float]:
    """Compare policy and reference on the first few pairs of the run. Collective.

    Args:
        trainer: with its policy and reference.
        pairs: to train on.
        rows: how they are laid out.
        seed: of their order.

    Returns:
        Every layer's mean loss, the final layer last; where intermediate layers are compared to the
        reference's final one, the final layer's alone.

    Raises:
        TrainingError: on every rank; they differ at some layer.
    """
    policy, objective = trainer.policy, trainer.objective
    count = min(len(pairs), PAIRS_PER_RANK * rows.data_size)
    index_B = stream_pairs(0, count, num_pairs=len(pairs), seed=seed)
    batch = build_batch(pairs, index_B, rows, consumed_pairs=0)
    reference_logps = trainer.reference.logps(batch)
    outputs = run_batch(policy.dpo, policy.trainable.model, batch, reference_logps)
    if objective.reference_layer == "final":
        outputs = [output for output in outputs if output.layer == policy.dpo.num_layers]
    message = gathered(_by_layer(outputs, response_lengths(batch.rows), objective))
    layers = sorted({layer for rank in message for layer in rank})
    losses, per_token = {}, {}
    for layer in layers:
        heard = [rank[layer] for rank in message if layer in rank]
        losses[layer] = sum(loss for loss, _, _ in heard) / sum(count for _, _, count in heard)
        per_token[layer] = max(difference for _, difference, _ in heard)
    is_fp32 = policy.chunks[0].config.params_dtype == torch.float32
    in_bf16 = BF16_LOGP_TOLERANCE if trainer.reference.is_live else CACHED_BF16_LOGP_TOLERANCE
    tolerance = FP32_LOGP_TOLERANCE if is_fp32 else in_bf16
    expected = loss_at_zero(objective)
    off = [
        f"layer {layer}: loss {losses[layer]:.6f}, a log-probability off by "
        f"{per_token[layer]:.2g} per token"
        for layer in layers
        if not per_token[layer] <= tolerance
    ]
    if off:
        raise TrainingError.at(
            "start check",
            f"policy and reference should be equal before the first step, so that every layer's "
            f"loss is {expected:.6f}, but at {'; '.join(off)}",
            "they are not the same model; if that is meant, set training.start_check to false",
        )
    return losses


def _by_layer(
    outputs: Sequence[LayerOutput], lengths: Sequence[torch.Tensor], objective: Objective
) -> dict[int, tuple[float, float, int]]:
    """Of this rank's layers: sum of losses, largest difference per token, number of pairs."""
    found: dict[int, tuple[float, float, int]] = {}
    for output in outputs:
        assert output.reference_logps_2P is not None, "the check needs a reference"
        lengths_2P = lengths[output.micro_batch]
        ratio_2P = output.logps_2P - output.reference_logps_2P
        per_token_2P = ratio_2P / lengths_2P
        compared_2P = per_token_2P if objective.loss in PER_TOKEN else ratio_2P
        loss_P = preference_loss(compared_2P[0::2] - compared_2P[1::2], objective)
        total, worst, count = found.get(output.layer, (0.0, 0.0, 0))
        largest = float(per_token_2P.abs().max()) if len(per_token_2P) else 0.0
        found[output.layer] = (
            total + float(loss_P.double().sum()),
            max(worst, largest),
            count + len(loss_P),
        )
    return found
