"""The oracle's steps are correct: equal to the optimizers' update rules, written out."""

import copy
import math

import pytest
import torch

from tests.oracle import train_steps

from .oracle_models import (
    BETA,
    ROUNDING,
    WEIGHT,
    assert_gradients_equal,
    gradients,
    make_model,
    make_pairs,
    mean_losses,
)

BATCHES = [make_pairs(1), make_pairs(2)]  # the third step repeats the first batch
STEPS = {"beta": BETA, "intermediate_weight": WEIGHT, "lr": 0.05}


def by_hand(model, optimizer, lr, eps=1e-4):
    """Three steps with the initial model as reference and the optimizer's update rule."""
    policy, initial = copy.deepcopy(model), model
    first = {n: torch.zeros_like(p) for n, p in policy.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in policy.named_parameters()}
    totals = []
    for step, batch in enumerate([*BATCHES, BATCHES[0]], start=1):
        loss = mean_losses(policy, initial, batch, [1, 3]).total
        totals.append(loss.detach())
        grads = gradients(policy, loss)
        for name, parameter in policy.named_parameters():
            g = grads[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            parameter.data -= lr * (g if optimizer == "sgd" else m / (v.sqrt() + eps))
    return totals, dict(policy.named_parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_three_steps_follow_the_optimizers_update_rule(model, optimizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = train_steps(model, "initial", BATCHES, [1, 3], optimizer=optimizer, **STEPS)
    totals, weights = by_hand(model, optimizer, STEPS["lr"])
    torch.testing.assert_close([step.total for step in run["losses"]], totals, **ROUNDING)
    assert run["losses"][1].total != pytest.approx(math.log(2), abs=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run["weights"][name], weights[name].detach(), **ROUNDING)
        assert torch.equal(parameter, before[name])
        assert not torch.equal(run["weights"][name], before[name])
    again = train_steps(model, "initial", BATCHES, [1, 3], optimizer=optimizer, **STEPS)
    for kind in ("gradients", "weights"):
        assert all(torch.equal(run[kind][name], value) for name, value in again[kind].items())


HEAD = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("options", "is_trained"),
    [
        ({"frozen_head": True}, lambda name: name not in HEAD),
        ({"trainable": "norm", "frozen_head": True}, lambda name: "layernorm" in name),
        ({"trainable": r"\.[qv]_proj\."}, lambda name: "q_proj" in name or "v_proj" in name),
    ],
)
def test_only_selected_parameters_are_trained(model, options, is_trained):
    full = train_steps(model, "initial", BATCHES, [1, 3], **STEPS)
    run = train_steps(model, "initial", BATCHES, [1, 3], **STEPS, **options)
    names = list(dict(model.named_parameters()))
    assert set(run["weights"]) == set(names)
    assert list(run["gradients"]) == [name for name in names if is_trained(name)]
    for name, parameter in model.named_parameters():
        assert torch.equal(run["weights"][name], parameter) is not is_trained(name), name
    # Freezing a parameter does not change the gradients of others.
    assert_gradients_equal(run["gradients"], {n: full["gradients"][n] for n in run["gradients"]})


def test_tied_projection_is_one_parameter_with_the_summed_gradient():
    model = make_model(tied=True)
    untied = make_model(tied=False)
    untied.load_state_dict(model.state_dict())
    assert torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)
    other = make_model(tied=False, seed=1)
    runs = [train_steps(m, other, BATCHES, [1, 3], **STEPS) for m in (model, untied)]
    one, two = (run["gradients"] for run in runs)
    assert "lm_head.weight" not in one
    both = two["model.embed_tokens.weight"] + two["lm_head.weight"]
    torch.testing.assert_close(one["model.embed_tokens.weight"], both, **ROUNDING)
