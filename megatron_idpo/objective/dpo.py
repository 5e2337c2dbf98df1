"""Direct preference optimization at several layers: Eq. 1-3 as tensor functions.

From sequence log-probabilities: the loss of a pair at one layer (Eq. 1) with its variants, metrics
under TRL's names, and the combination of the layers' losses (Eq. 2 and 3). With policy θ, reference
ref, chosen answer w, rejected answer l and

    Δ_l = [log π_l^θ(w|x) − log π_l^ref(w|x)] − [log π_l^θ(l|x) − log π_l^ref(l|x)]

    L_l   = −log σ(β Δ_l)                           Eq. 1
    L_int = Σ_l α_l L_l, Σ α_l = 1 (mean: 1/K)       Eq. 2
    L     = (1 − w) L_final + w L_int                Eq. 3, w = `intermediate_weight`

(intermediate DPO: Kojima 2024, arXiv 2408.02923; DPO: Rafailov et al. 2023, arXiv 2305.18290).

Log-probabilities, the mean over a batch and the placement of layers are elsewhere.

    P  pairs   2P  their sequences: 2p is pair p's chosen answer, 2p + 1 the rejected one
    K  intermediate layers
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_idpo.config.objective import Objective
from megatron_idpo.objective.losses import PAIR_LOSSES, Pairs

__all__ = ["Objective", "combine", "layer_loss", "layer_metrics", "loss_at_zero", "preference_loss"]


def layer_loss(
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
    *,
    mean_chosen_tokens: float | None = None,
    sharpened_logps_2P: Tensor | None = None,
) -> Tensor:
    """Eq. 1 at one layer, intermediate or final: the loss of each pair.

    With `nll_weight` λ it is the sum of the losses plus −λ log π_l(w|x) / |w|: a mean over the
    tokens of *this* answer (RPO: Pang et al. 2024, arXiv 2404.19733, Eq. 1). The loss `sft` is the
    mean over all chosen tokens of a batch instead, as TRL has it.

    Args:
        policy_logps_2P: log π_l^θ(y|x) of each answer, sums over its tokens, float, <= 0.
        reference_logps_2P: those of the reference, constant. None: no reference, all zeros.
        lengths_2P: tokens of each answer, >= 1; used by losses per token and the NLL.
        objective: which loss.
        mean_chosen_tokens: of the global batch, for `sft`. None: these pairs are the global batch.
        sharpened_logps_2P: of the policy at half its temperature, for `wpo`.

    Returns:
        `[P]`, in the policy's dtype, with a gradient to the policy only.
    """
    loss_P = preference_loss(
        policy_logps_2P,
        reference_logps_2P,
        lengths_2P,
        objective,
        mean_chosen_tokens=mean_chosen_tokens,
    )
    if objective.wpo:
        assert sharpened_logps_2P is not None, "WPO needs them"
        loss_P = loss_P * _pair_weights(policy_logps_2P, sharpened_logps_2P, lengths_2P)
    if objective.nll_weight:
        loss_P = loss_P + objective.nll_weight * _chosen_nll(policy_logps_2P, lengths_2P)
    return loss_P


def preference_loss(
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
    *,
    mean_chosen_tokens: float | None = None,
    with_sft: bool = True,
) -> Tensor:
    """`layer_loss` without weights of pairs and without `nll_weight`.

    Args:
        policy_logps_2P: as for `layer_loss`.
        reference_logps_2P: as for `layer_loss`.
        lengths_2P: as for `layer_loss`.
        objective: as for `layer_loss`.
        mean_chosen_tokens: as for `layer_loss`.
        with_sft: False leaves out `sft`, which does not compare policy and reference.
    """
    reference_2P = torch.zeros_like(policy_logps_2P)
    if reference_logps_2P is not None:
        assert reference_logps_2P.shape == policy_logps_2P.shape, "one reference value per answer"
        reference_2P = reference_logps_2P.detach()
    mean: float | Tensor = 1.0 if mean_chosen_tokens is None else mean_chosen_tokens
    if mean_chosen_tokens is None and objective.uses("sft"):
        mean = lengths_2P[0::2].mean(dtype=policy_logps_2P.dtype)
    pairs = Pairs(policy_logps_2P, reference_2P, lengths_2P, mean)
    loss_P = torch.zeros_like(policy_logps_2P[0::2])
    for name, weight in objective.terms:
        if name != "sft" or with_sft:
            loss_P = loss_P + weight * PAIR_LOSSES[name](pairs, objective)
    return loss_P


def loss_at_zero(objective: Objective) -> float:
    """`preference_loss` where policy and reference are equal: ln 2 for `sigmoid`.

    Without the likelihood terms `sft` and `nll_weight`, and without the weights of `wpo`.
    """
    zeros_2P, ones_2P = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    return float(preference_loss(zeros_2P, None, ones_2P, objective, with_sft=False))


def layer_metrics(
    loss_P: Tensor,
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
) -> dict[str, Tensor]:
    """Metrics of each pair at one layer, under TRL's names.

    Rewards are β times log-ratios of whole answers, also for losses per token and other
    f-divergences, as in TRL. A margin of exactly 0 counts as not accurate.

    Args:
        loss_P: `layer_loss`.
        policy_logps_2P: as for `layer_loss`.
        reference_logps_2P: as for `layer_loss`.
        lengths_2P: as for `layer_loss`.
        objective: as for `layer_loss`.

    Returns:
        `loss`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (0 or
        1), `logps/chosen`, `logps/rejected`, and `nll_loss` (per token, unweighted) where
        `nll_weight` is not 0. Each `[P]` and detached; average them over pairs.
    """
    with torch.no_grad():
        rewards_2P = objective.beta * _log_ratio(policy_logps_2P, reference_logps_2P)
        chosen_P, rejected_P = rewards_2P[0::2], rewards_2P[1::2]
        logps_2P = policy_logps_2P.detach()
        metrics = {
            "loss": loss_P.detach(),
            "rewards/chosen": chosen_P,
            "rewards/rejected": rejected_P,
            "rewards/margins": chosen_P - rejected_P,
            "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
            "logps/chosen": logps_2P[0::2],
            "logps/rejected": logps_2P[1::2],
        }
        if objective.nll_weight:
            metrics["nll_loss"] = _chosen_nll(logps_2P, lengths_2P)
        return metrics


def combine(
    final_loss_P: Tensor, intermediate_losses: Sequence[Tensor], objective: Objective
) -> Tensor:
    """Eq. 2 and 3: one loss per pair from those of all layers.

    Args:
        final_loss_P: `layer_loss` of the final layer.
        intermediate_losses: of the K intermediate layers, each `[P]`; empty is plain DPO.
        objective: the weights.

    Returns:
        `[P]`.

    Raises:
        ConfigError: the number of `layer_weights` is not K.
    """
    final_scale, scales = objective.layer_scales(len(intermediate_losses))
    total_P = final_scale * final_loss_P
    for scale, loss_P in zip(scales, intermediate_losses, strict=True):
        total_P = total_P + scale * loss_P
    return total_P


def _log_ratio(policy_logps_2P: Tensor, reference_logps_2P: Tensor | None) -> Tensor:
    """log π^θ − log π^ref of each sequence."""
    if reference_logps_2P is None:
        return policy_logps_2P
    return policy_logps_2P - reference_logps_2P.detach()


def _chosen_nll(policy_logps_2P: Tensor, lengths_2P: Tensor) -> Tensor:
    """−log π(w|x) per token of w, `[P]`."""
    return -policy_logps_2P[0::2] / lengths_2P[0::2]


def _pair_weights(policy_2P: Tensor, sharpened_2P: Tensor, lengths_2P: Tensor) -> Tensor:
    """WPO's weight of each pair: the product of its answers' weights, without gradient.

    An answer's weight is the geometric mean of p_y / Σ_v p_v² over its tokens (WPO's alignment by
    the expected probability of a sampled token). With q the policy at half the temperature,
    q_v = p_v² / Σ p², so that log p_y − log Σ p² = log q_y − log p_y.
    """
    weight_2P = ((sharpened_2P - policy_2P).detach() / lengths_2P).exp()
    return weight_2P[0::2] * weight_2P[1::2]
