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
from torch.nn.functional import logsigmoid, relu

from megatron_idpo.config.objective import PER_TOKEN, Objective

__all__ = ["Objective", "combine", "layer_loss", "layer_metrics", "loss_at_zero", "preference_loss"]


def preference_loss(difference_P: Tensor, objective: Objective) -> Tensor:
    """The loss of a pair as a function of Δ, Eq. 1 and its variants.

    sigmoid         −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                 DPO; ε > 0: cDPO (Mitchell 2023)
    sigmoid_norm    the same, of means over tokens                  length-normalised DPO
    robust          [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)    arXiv 2403.00409
    ipo             (Δ − 1/(2β))², of means over tokens             arXiv 2310.12036, Eq. 17
    hinge           max(0, 1 − βΔ)                                  RSO, arXiv 2309.06657

    Args:
        difference_P: Δ; from sums or means over tokens, as the loss requires.
        objective: loss, beta and label_smoothing.

    Returns:
        `[P]`, >= 0 except for `robust`, which is unbiased under swapped labels and may be negative.
    """
    beta, smoothing = objective.beta, objective.label_smoothing
    if objective.loss == "ipo":
        return (difference_P - 1 / (2 * beta)) ** 2
    if objective.loss == "hinge":
        return relu(1 - beta * difference_P)
    # logsigmoid, not log(sigmoid): exact for large negative βΔ, where sigmoid underflows.
    as_labeled_P = -(1 - smoothing) * logsigmoid(beta * difference_P)
    if not smoothing:
        return as_labeled_P
    swapped_P = -smoothing * logsigmoid(-beta * difference_P)
    if objective.loss == "robust":  # the swapped term is subtracted, so this can be negative
        return (as_labeled_P - swapped_P) / (1 - 2 * smoothing)
    return as_labeled_P + swapped_P


def loss_at_zero(objective: Objective) -> float:
    """`preference_loss` at Δ = 0, where policy and reference are equal: ln 2 for `sigmoid`.

    Without the likelihood term (`nll_weight`), which `layer_metrics` reports separately.
    """
    return float(preference_loss(torch.zeros(1, dtype=torch.float64), objective))


def layer_loss(
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
) -> Tensor:
    """Eq. 1 at one layer, intermediate or final: the loss of each pair.

    With `nll_weight` λ it is the preference loss plus −λ log π_l(w|x) / |w|: a mean over the tokens
    of *this* answer (RPO: Pang et al. 2024, arXiv 2404.19733, Eq. 1). TRL's likelihood term is the
    mean over all chosen tokens of a batch instead, so that a pair's loss depends on the other pairs
    of the batch; with one pair per batch the two are equal.

    Args:
        policy_logps_2P: log π_l^θ(y|x) of each sequence, sums over its tokens, float, <= 0.
        reference_logps_2P: those of the reference, constant. None: no reference, all zeros.
        lengths_2P: tokens of each sequence, >= 1; used by losses per token and the NLL.
        objective: which loss.

    Returns:
        `[P]`, in the policy's dtype, with a gradient to the policy only.
    """
    ratio_2P = _log_ratio(policy_logps_2P, reference_logps_2P)
    if objective.loss in PER_TOKEN:
        ratio_2P = ratio_2P / lengths_2P
    # Chosen and rejected answers alternate along the first dimension.
    loss_P = preference_loss(ratio_2P[0::2] - ratio_2P[1::2], objective)
    if objective.nll_weight:
        loss_P = loss_P + objective.nll_weight * _chosen_nll(policy_logps_2P, lengths_2P)
    return loss_P


def layer_metrics(
    policy_logps_2P: Tensor,
    reference_logps_2P: Tensor | None,
    lengths_2P: Tensor,
    objective: Objective,
) -> dict[str, Tensor]:
    """Metrics of each pair at one layer, under TRL's names.

    Rewards are β times log-ratios of whole sequences, also for losses per token, as in TRL. A
    margin of exactly 0 counts as not accurate.

    Args:
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
            "loss": layer_loss(policy_logps_2P, reference_logps_2P, lengths_2P, objective),
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
    assert reference_logps_2P.shape == policy_logps_2P.shape, "one reference value per sequence"
    return policy_logps_2P - reference_logps_2P.detach()


def _chosen_nll(policy_logps_2P: Tensor, lengths_2P: Tensor) -> Tensor:
    """−log π(w|x) per token of w, `[P]`."""
    return -policy_logps_2P[0::2] / lengths_2P[0::2]
