"""TRL's losses on given log-probabilities: `DPOTrainer._compute_loss` on a stand-in of a trainer.

Runs in the process of `trl_reference.py`, and imports nothing from this package.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LOSSES = {
    **{name: {} for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair")},
    **{name: {} for name in ("sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")},
    **{name: {} for name in ("discopop", "sft")},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 1e-3},
}
"""TRL's losses, each with the settings that it needs."""

OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js_divergence"},
    {"f_divergence": "alpha_divergence"},
    {"f_divergence": "alpha_divergence", "f_alpha": 1.5},
    {"f_divergence": "alpha_divergence", "f_alpha": 1.0},
]
TRL_NAMES = {
    "loss": "loss_type",
    "f_divergence": "f_divergence_type",
    "f_alpha": "f_alpha_divergence_coef",
    "wpo": "use_weighting",
}
"""TRL's names of our fields, where they differ."""


def loss_cases() -> list[dict[str, Any]]:
    """Fields of our `Objective`. Label smoothing of `sigmoid` is ours (cDPO)."""
    plain = [{"loss": name, **settings} for name, settings in LOSSES.items()]
    cases = [*plain, {"loss": "discopop", "discopop_tau": 0.5}]
    cases += [{"loss": name, "label_smoothing": 0.1} for name in ("aot", "aot_unpaired")]
    cases += [{**LOSSES[name], "loss": name, **f} for name in OF_DIFFERENCE for f in DIVERGENCES]
    weighted = [case for case in plain if case["loss"] not in ("aot", "aot_unpaired", "sft")]
    cases += [{**case, "wpo": True} for case in weighted]
    mpo = {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    cases += [mpo, {"loss": ["ipo", "apo_zero"], "loss_weights": [0.5, 2.0], "wpo": True}]
    return [{"beta": 0.3, **case} for case in cases]


def log_probabilities() -> dict[str, Tensor]:
    """Of 6 answers of 3 to 9 tokens and a vocabulary of 11: chosen first, then rejected.

    Returns:
        `logps_ST`, `sharpened_ST` (at half the temperature) and `mask_ST`; `reference_S`.
    """
    random = torch.Generator().manual_seed(3)
    mask_ST = torch.arange(9) < torch.tensor([4, 9, 3, 7, 5, 6])[:, None]
    logits_STV = 2 * torch.randn(6, 9, 11, generator=random)
    token_ST1 = torch.randint(11, (6, 9, 1), generator=random)
    logps_ST, sharpened_ST = (
        (sharpness * logits_STV).log_softmax(-1).gather(-1, token_ST1)[..., 0] * mask_ST
        for sharpness in (1, 2)
    )
    reference_S = logps_ST.sum(1) + 2 * torch.randn(6, generator=random)
    return {
        "logps_ST": logps_ST,
        "sharpened_ST": sharpened_ST,
        "mask_ST": mask_ST,
        "reference_S": reference_S,
    }


def losses_of_trl() -> list[dict[str, Any]]:
    """For each case, `loss` and `gradient`, with respect to each token's log-probability [S, T]."""
    relu = torch.relu
    # With `use_weighting`, TRL multiplies the result of torch.relu in place, for `hinge`; autograd
    # refuses that, so TRL 1.16 cannot train this combination.
    torch.relu = lambda values: relu(values).clone()
    try:
        return [_loss_of_trl(fields) for fields in loss_cases()]
    finally:
        torch.relu = relu


def _loss_of_trl(fields: dict[str, Any]) -> dict[str, Any]:
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = {TRL_NAMES.get(name, name): value for name, value in fields.items()}
    args = DPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **settings)
    case = log_probabilities()
    logps_ST = case["logps_ST"].clone().requires_grad_()
    trainer = _trainer(args)
    zeros_ST = torch.zeros_like(case["logps_ST"])
    outputs = SimpleNamespace(
        log_probs=logps_ST,
        # Σ p² from the softmax at half the temperature: q_y = p_y² / Σ p².
        log_sum_sq_probs=2 * case["logps_ST"] - case["sharpened_ST"],
        entropy=zeros_ST,
        mean_logits=zeros_ST,
        is_top1=zeros_ST.bool(),
    )
    # One prompt token, which predicts the first answer token.
    mask_ST = torch.nn.functional.pad(case["mask_ST"].long(), (1, 0))
    chosen, rejected = case["reference_S"].chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask_ST),
        "attention_mask": torch.ones_like(mask_ST),
        "completion_mask": mask_ST,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    compute_loss: Any = DPOTrainer._compute_loss
    loss = compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    assert logps_ST.grad is not None
    return {"loss": loss.item(), "gradient": logps_ST.grad.tolist()}


def _trainer(args: Any) -> Any:
    """What `_compute_loss` reads of a trainer."""

    def same(values: Tensor) -> Tensor:
        return values

    return SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same
        ),
        beta=args.beta,
        loss_types=args.loss_type,
        loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
        label_smoothing=args.label_smoothing,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        use_weighting=args.use_weighting,
        ld_alpha=None,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
