"""Losses and metrics against formulas that are written out independently."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from megatron_idpo.errors import ConfigError
from megatron_idpo.objective.dpo import Objective, combine, layer_loss, layer_metrics, loss_at_zero

POLICY_2P = torch.tensor([-10.0, -14.0, -6.0, -3.0], dtype=torch.float64)
REFERENCE_2P = torch.tensor([-11.0, -12.0, -4.0, -5.0], dtype=torch.float64)
LENGTHS_2P = torch.tensor([4, 7, 2, 3])
# Log-ratios 1, -2 | -2, 2: differences 3, -4; per token 1/4, -2/7 | -1, 2/3: 15/28, -5/3.

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # float64, a handful of operations
LN2 = math.log(2)

VARIANTS = [
    Objective(loss="sigmoid"),
    Objective(loss="sigmoid", label_smoothing=0.1, nll_weight=0.5),
    Objective(loss="sigmoid_norm", beta=2.0),
    Objective(loss="robust", label_smoothing=0.2),
    Objective(loss="ipo", beta=0.3),
    Objective(loss="hinge", beta=0.5),
    Objective(loss=("exo_pair", "nca_pair", "bco_pair"), label_smoothing=0.1),
    Objective(loss=("sppo_hard", "apo_zero", "apo_down"), loss_weights=(0.1, 2.0, 3.0)),
    Objective(loss=("aot", "aot_unpaired", "discopop", "sft"), label_smoothing=0.2),
    *(
        Objective(f_divergence=divergence)
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
]


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective(beta=0.5), [-math.log(sigma(1.5)), -math.log(sigma(-2.0))]),
        (
            Objective(beta=0.5, label_smoothing=0.1),
            [
                -0.9 * math.log(sigma(1.5)) - 0.1 * math.log(sigma(-1.5)),
                -0.9 * math.log(sigma(-2.0)) - 0.1 * math.log(sigma(2.0)),
            ],
        ),
        (
            Objective(loss="robust", beta=0.5, label_smoothing=0.1),
            [
                (-0.9 * math.log(sigma(1.5)) + 0.1 * math.log(sigma(-1.5))) / 0.8,
                (-0.9 * math.log(sigma(-2.0)) + 0.1 * math.log(sigma(2.0))) / 0.8,
            ],
        ),
        (
            Objective(loss="sigmoid_norm", beta=2.0),
            [-math.log(sigma(2 * 15 / 28)), -math.log(sigma(-2 * 5 / 3))],
        ),
        (Objective(loss="ipo", beta=0.25), [(15 / 28 - 2) ** 2, (-5 / 3 - 2) ** 2]),
        (Objective(loss="hinge", beta=0.25), [1 - 0.75, 1 + 1.0]),
        (Objective(loss="hinge", beta=0.5), [0.0, 3.0]),
        (
            Objective(beta=0.5, nll_weight=0.2),
            [-math.log(sigma(1.5)) + 0.2 * 10 / 4, -math.log(sigma(-2.0)) + 0.2 * 6 / 2],
        ),
    ],
    ids=str,
)
def test_every_variant_equals_its_formula(objective, expected):
    loss_P = layer_loss(POLICY_2P, REFERENCE_2P, LENGTHS_2P, objective)
    torch.testing.assert_close(loss_P, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


def test_no_reference_equals_a_reference_of_zeros():
    for objective in VARIANTS:
        without = layer_loss(POLICY_2P, None, LENGTHS_2P, objective)
        zeros = layer_loss(POLICY_2P, torch.zeros_like(POLICY_2P), LENGTHS_2P, objective)
        torch.testing.assert_close(without, zeros, **TOLERANCE)


@pytest.mark.parametrize("objective", VARIANTS, ids=str)
def test_gradients(objective):
    policy_2P = POLICY_2P.clone().requires_grad_()
    assert gradcheck(
        lambda logps: layer_loss(logps, REFERENCE_2P, LENGTHS_2P, objective), (policy_2P,)
    )


def test_the_reference_gets_no_gradient():
    policy_2P, reference_2P = POLICY_2P.clone().requires_grad_(), REFERENCE_2P.clone()
    layer_loss(policy_2P, reference_2P.requires_grad_(), LENGTHS_2P, Objective()).sum().backward()
    assert policy_2P.grad is not None and reference_2P.grad is None


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective(), math.log(2)),
        (Objective(label_smoothing=0.3), math.log(2)),
        (Objective(loss="robust", label_smoothing=0.3), math.log(2)),
        (Objective(loss="sigmoid_norm", nll_weight=1.0), math.log(2)),
        (Objective(loss="hinge"), 1.0),
        (Objective(loss="ipo", beta=0.1), 25.0),
        (Objective(loss="nca_pair"), 2 * math.log(2)),
        (Objective(loss=("sppo_hard", "sigmoid"), beta=0.1, loss_weights=(0.1, 2.0)), 5 + 2 * LN2),
        (Objective(loss=("apo_zero", "apo_down", "aot")), 2 + LN2),
        (Objective(f_divergence="js_divergence"), LN2),
    ],
    ids=str,
)
def test_loss_of_equal_policy_and_reference(objective, expected):
    assert loss_at_zero(objective) == pytest.approx(expected, rel=1e-15)
    if not objective.nll_weight:
        loss_P = layer_loss(POLICY_2P, POLICY_2P, LENGTHS_2P, objective)
        torch.testing.assert_close(loss_P, torch.full_like(loss_P, expected), **TOLERANCE)


@given(
    st.floats(-1e6, 1e6),
    st.floats(0.01, 5),
    st.just(0.0) | st.floats(1e-6, 0.49),
    st.sampled_from(["sigmoid", "robust", "sigmoid_norm"]),
)
def test_label_smoothing_mixes_both_labels(difference, beta, smoothing, loss):
    """For robust: the mean over the assumed flips is the loss without smoothing."""
    policy_2P = torch.tensor([difference, 0.0, -difference, 0.0], dtype=torch.float64)
    lengths_2P = torch.ones(4)
    plain = layer_loss(policy_2P, None, lengths_2P, Objective(beta=beta))
    objective = Objective(loss=loss, beta=beta, label_smoothing=smoothing)
    smoothed = layer_loss(policy_2P, None, lengths_2P, objective)
    assert torch.isfinite(smoothed).all()
    expected = plain[0]
    if loss == "robust":
        mixed = (1 - smoothing) * smoothed[0] + smoothing * smoothed[1]
    else:
        mixed, expected = smoothed[0], (1 - smoothing) * plain[0] + smoothing * plain[1]
    # Losses of millions, and robust divides by 1 - 2 * smoothing, which loses two digits at 0.49.
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-7)


def test_metrics_have_names_and_values_of_trl():
    objective = Objective(beta=0.5, nll_weight=0.2)
    policy_2P = POLICY_2P.clone().requires_grad_()
    loss_P = layer_loss(policy_2P, REFERENCE_2P, LENGTHS_2P, objective)
    metrics = layer_metrics(loss_P, policy_2P, REFERENCE_2P, LENGTHS_2P, objective)
    expected = {
        "loss": loss_P.tolist(),
        "rewards/chosen": [0.5, -1.0],
        "rewards/rejected": [-1.0, 1.0],
        "rewards/margins": [1.5, -2.0],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-10.0, -6.0],
        "logps/rejected": [-14.0, -3.0],
        "nll_loss": [2.5, 3.0],
    }
    assert {name: values_P.tolist() for name, values_P in metrics.items()} == expected
    assert not any(values_P.requires_grad for values_P in metrics.values())
    assert "nll_loss" not in layer_metrics(loss_P, POLICY_2P, None, LENGTHS_2P, Objective())


def test_rewards_are_sums_and_a_zero_margin_is_not_accurate():
    objective, loss_P = Objective(loss="ipo", beta=0.5), torch.zeros(2)
    metrics = layer_metrics(loss_P, POLICY_2P, POLICY_2P, LENGTHS_2P, objective)
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.0]
    metrics = layer_metrics(loss_P, POLICY_2P, REFERENCE_2P, LENGTHS_2P, objective)
    assert metrics["rewards/margins"].tolist() == [1.5, -2.0]


def test_a_row_without_pairs():
    none = torch.zeros(0, requires_grad=True)
    loss_P = layer_loss(none, None, none.detach(), Objective(nll_weight=1.0))
    assert loss_P.shape == (0,) and loss_P.requires_grad
    assert combine(loss_P, [loss_P], Objective()).shape == (0,)


def test_discopop_is_finite_for_every_margin():
    """TRL's product of an exponential and a sigmoid is NaN where a margin is below −88."""
    policy_2P = torch.tensor([-500.0, 0.0, 500.0, 0.0], requires_grad=True)
    loss_P = layer_loss(policy_2P, None, torch.ones(4), Objective(loss="discopop", beta=1.0))
    loss_P.sum().backward()
    assert loss_P.isfinite().all() and policy_2P.grad.isfinite().all()
    assert loss_P[0].item() == pytest.approx(500.0)


def test_the_loss_of_sorted_values_is_at_its_pair():
    """A NaN is reported at the pair that has it."""
    policy_2P = POLICY_2P.clone()
    policy_2P[0] = math.nan
    for loss in ("aot", "aot_unpaired"):
        loss_P = layer_loss(policy_2P, REFERENCE_2P, LENGTHS_2P, Objective(loss=loss))
        assert loss_P.isnan().tolist() == [True, False]


def test_sft_is_a_mean_over_the_tokens_of_the_global_batch():
    objective = Objective(loss="sft")
    loss_P = layer_loss(POLICY_2P, None, LENGTHS_2P, objective)
    assert float(loss_P.mean()) == pytest.approx(16 / 6)
    parts = [
        layer_loss(POLICY_2P[at], None, LENGTHS_2P[at], objective, mean_chosen_tokens=3.0)
        for at in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), loss_P, **TOLERANCE)


FINAL_P = torch.tensor([1.0, 2.0])
LAYERS = [torch.tensor([4.0, 0.0]), torch.tensor([8.0, 6.0])]


@pytest.mark.parametrize(
    ("objective", "layers", "total"),
    [
        (Objective(intermediate_weight=0.1), LAYERS, [0.9 + 0.6, 1.8 + 0.3]),
        (Objective(intermediate_weight=0.1), LAYERS[:1], [0.9 + 0.4, 1.8]),
        (Objective(intermediate_weight=0.1), [], [1.0, 2.0]),
        (Objective(intermediate_weight=0.0), LAYERS, [1.0, 2.0]),
        (Objective(intermediate_weight=1.0), LAYERS, [6.0, 3.0]),
        (
            Objective(intermediate_weight=0.5, layer_weights=(1.0, 3.0)),
            LAYERS,
            [0.5 + 0.5 * 7.0, 1.0 + 0.5 * 4.5],
        ),
    ],
)
def test_combine(objective, layers, total):
    torch.testing.assert_close(combine(FINAL_P, layers, objective), torch.tensor(total))


def test_a_wrong_number_of_layer_weights_is_reported():
    with pytest.raises(ConfigError, match=r"layer_weights: 2 weights for 3 layers"):
        combine(FINAL_P, [FINAL_P] * 3, Objective(layer_weights=(1.0, 2.0)))
