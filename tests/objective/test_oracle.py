"""The oracle is correct: each part equals an independent computation.

These are Transformers' own loss on a model truncated after a layer, Python's `math`, finite
differences, and plain DPO. Models are tiny and random, and in float64 where the oracle is compared
with itself or with differences, so that tolerances cover rounding only.
"""

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from tests.oracle import pair_losses, sequence_logps, train_steps

from .oracle_models import (
    BETA,
    LAYERS,
    LENGTHS,
    ROUNDING,
    WEIGHT,
    assert_gradients_equal,
    gradients,
    make_model,
    make_pairs,
    mean_losses,
)

FP32_RELATIVE = 1e-5
"""Log-probabilities of some ten nats through four layers of fp32."""
LN2_ATOL = 1e-6
"""fp32, where policy and reference are the same computation."""
DIFFERENCE_RELATIVE = 1e-6
"""Central differences of step 1e-5 have an error of about 1e-10 of the third derivative."""


PAIRS = make_pairs()
ALL = range(1, LAYERS + 1)


def test_oracle_is_short_and_imports_nothing_of_the_package():
    source = (Path(__file__).parents[1] / "oracle.py").read_text()
    assert len(source.splitlines()) <= 210
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported <= {*sys.stdlib_module_names, "torch"}


def test_transformers_hidden_states_have_the_documented_order(stock):
    outputs = {}

    def keep(name):
        return lambda module, args, output: outputs.update({name: output})

    for number, layer in enumerate(stock.model.layers, start=1):
        layer.register_forward_hook(keep(number))
    stock.model.embed_tokens.register_forward_hook(keep(0))
    stock.model.norm.register_forward_hook(keep("norm"))
    seen = stock(torch.arange(10)[None], output_hidden_states=True)
    assert len(seen.hidden_states) == LAYERS + 1
    for number in range(LAYERS):
        assert torch.equal(seen.hidden_states[number], outputs[number])
    assert torch.equal(seen.hidden_states[LAYERS], outputs["norm"])
    assert torch.equal(outputs["norm"], stock.model.norm(outputs[LAYERS]))
    assert torch.equal(seen.logits, stock.lm_head(seen.hidden_states[LAYERS]))


@pytest.mark.parametrize("norm", ["final", "none"])
def test_layer_equals_a_model_truncated_after_it(stock, norm):
    logps = sequence_logps(stock, PAIRS, ALL, norm)
    for layer in ALL:
        truncated = copy.deepcopy(stock)
        truncated.model.layers = truncated.model.layers[:layer]
        truncated.config.num_hidden_layers = layer
        if norm == "none" and layer < LAYERS:
            truncated.model.norm = torch.nn.Identity()
        expected = []
        for prompt, *responses in PAIRS:
            for response in responses:
                tokens = torch.tensor([prompt + response])
                labels = torch.tensor([[-100] * len(prompt) + response])
                expected.append(-truncated(tokens, labels=labels).loss * len(response))
        torch.testing.assert_close(logps[layer], torch.stack(expected), rtol=FP32_RELATIVE, atol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("together", [None, 4])
def test_padding_does_not_change_log_probabilities_or_gradients(window, together):
    model = make_model(window=window)
    alone = sequence_logps(model, PAIRS, ALL, sequences_per_forward=1)
    padded = sequence_logps(model, PAIRS, ALL, sequences_per_forward=together)
    for layer in ALL:
        torch.testing.assert_close(padded[layer], alone[layer], **ROUNDING)
        both = [gradients(model, logps[layer].sum()) for logps in (padded, alone)]
        assert_gradients_equal(*both)


def test_loss_of_every_layer_starts_at_ln_2(stock):
    run = train_steps(stock, "initial", [PAIRS], [1, 2, 3], beta=BETA, lr=0.0, steps=2)
    for step in run["losses"]:
        assert step.by_layer.keys() == set(ALL)
        for loss in (step.total, *step.by_layer.values()):
            assert loss.item() == pytest.approx(math.log(2), abs=LN2_ATOL)
        for margins in step.margins.values():
            assert margins.shape == (len(PAIRS),)
            assert margins.abs().max() <= LN2_ATOL


def cross(x, right, wrong):
    return right * math.log1p(math.exp(-x)) + wrong * math.log1p(math.exp(x))


DEFINITIONS = {
    ("sigmoid", 0.0): lambda gap, mean_gap: cross(BETA * gap, 1.0, 0.0),
    ("sigmoid", 0.1): lambda gap, mean_gap: cross(BETA * gap, 0.9, 0.1),
    ("robust", 0.1): lambda gap, mean_gap: cross(BETA * gap, 0.9 / 0.8, -0.1 / 0.8),
    ("sigmoid_norm", 0.0): lambda gap, mean_gap: cross(BETA * mean_gap, 1.0, 0.0),
    ("ipo", 0.0): lambda gap, mean_gap: (mean_gap - 1 / (2 * BETA)) ** 2,
    ("hinge", 0.0): lambda gap, mean_gap: max(0.0, 1 - BETA * gap),
}
"""(loss, label smoothing) -> a pair's loss from its gap of log-ratios: sums, means over tokens."""


@pytest.mark.parametrize("variant", DEFINITIONS, ids=str)
def test_loss_variants_equal_their_definitions(variant):
    logratios = torch.tensor([1.5, -2.0, 0.25, 4.0, 9.0, -9.0], dtype=torch.float64)
    lengths = torch.tensor([n for _, *both in LENGTHS for n in both])
    actual = pair_losses(logratios, lengths, BETA, *variant)
    for pair, (_, chosen, rejected) in enumerate(LENGTHS):
        a, b = logratios[2 * pair].item(), logratios[2 * pair + 1].item()
        expected = DEFINITIONS[variant](a - b, a / chosen - b / rejected)
        assert actual[pair].item() == pytest.approx(expected, rel=1e-12)


def test_nll_is_averaged_over_chosen_tokens_and_pairs(models):
    plain, joined = (mean_losses(*models, PAIRS, [2], nll_weight=w) for w in (0.0, 0.5))
    for layer in (2, LAYERS):
        chosen = sequence_logps(models[0], PAIRS, [layer])[layer][0::2]
        per_token = [logp.item() / n for logp, (_, n, _) in zip(chosen, LENGTHS, strict=True)]
        added = joined.by_layer[layer] - plain.by_layer[layer]
        assert added.item() == pytest.approx(-0.5 * sum(per_token) / len(PAIRS), rel=1e-9)


def test_empty_layers_equal_plain_dpo(models):
    policy, reference = models

    def logp(model, prompt, response):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return -cross_entropy(logits, torch.tensor(response), reduction="sum")

    total = 0.0
    for prompt, chosen, rejected in PAIRS:
        with torch.no_grad():
            reference_gap = logp(reference, prompt, chosen) - logp(reference, prompt, rejected)
        gap = logp(policy, prompt, chosen) - logp(policy, prompt, rejected)
        total -= logsigmoid(BETA * (gap - reference_gap)) / len(PAIRS)
    actual = mean_losses(policy, reference, PAIRS, [], weight=0.9)
    torch.testing.assert_close(actual.total, total, **ROUNDING)
    assert_gradients_equal(gradients(policy, actual.total), gradients(policy, total))


def test_gradient_of_one_layer_equals_finite_differences(models):
    policy, reference = models
    analytic = gradients(policy, mean_losses(policy, reference, PAIRS, [2]).total)
    generator = torch.Generator().manual_seed(0)
    step = 1e-5

    @torch.no_grad()
    def moved(parameter, direction, by):
        parameter.add_(by * direction)
        value = mean_losses(policy, reference, PAIRS, [2]).total.item()
        parameter.sub_(by * direction)
        return value

    for name, parameter in policy.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        up, down = moved(parameter, direction, step), moved(parameter, direction, -step)
        expected = (analytic[name] * direction).sum().item()
        tolerance = DIFFERENCE_RELATIVE * analytic[name].norm().item()
        assert (up - down) / (2 * step) == pytest.approx(expected, abs=tolerance), name


@pytest.mark.parametrize("layer_weights", [None, (3.0, 1.0)])
def test_total_gradient_is_the_weighted_sum_of_separate_gradients(models, layer_weights):
    def gradient(layers, **options):
        return gradients(models[0], mean_losses(*models, PAIRS, layers, **options).total)

    together = gradient([1, 3], layer_weights=layer_weights)
    shares = {1: 0.75, 3: 0.25} if layer_weights else {1: 0.5, 3: 0.5}
    # Each layer without the final one, then the final layer alone.
    parts = [(WEIGHT * share, gradient([k], weight=1.0)) for k, share in shares.items()]
    parts.append((1 - WEIGHT, gradient([])))
    mixed = {name: sum(share * part[name] for share, part in parts) for name in together}
    assert_gradients_equal(together, mixed)


def test_losses_are_averaged_over_the_pairs_of_the_batch(models):
    whole = mean_losses(*models, PAIRS, [1, 2])
    single = [mean_losses(*models, [pair], [1, 2]) for pair in PAIRS]
    torch.testing.assert_close(whole.total, sum(part.total for part in single) / 3, **ROUNDING)
    for layer in (1, 2, LAYERS):
        expected = torch.cat([part.margins[layer] for part in single])
        torch.testing.assert_close(whole.margins[layer], expected, **ROUNDING)


def test_reference_of_the_final_layer_and_no_reference(models):
    policy, reference = models
    read = (2, LAYERS)
    policy_logps = sequence_logps(policy, PAIRS, read)
    gaps = {k: v[0::2] - v[1::2] for k, v in policy_logps.items()}
    final_logps = sequence_logps(reference, PAIRS, read)[LAYERS]
    final_gap = final_logps[0::2] - final_logps[1::2]
    against_final = mean_losses(*models, PAIRS, [2], reference_layer="final")
    against_none = mean_losses(policy, None, PAIRS, [2])
    for actual, reference_gap in ((against_final, final_gap), (against_none, 0.0)):
        for k in read:
            margins = BETA * (gaps[k] - reference_gap)
            torch.testing.assert_close(actual.margins[k], margins.detach(), **ROUNDING)
            torch.testing.assert_close(actual.by_layer[k], -logsigmoid(margins).mean(), **ROUNDING)


def test_invalid_arguments_are_rejected():
    model = make_model(dtype=torch.float32)

    def rejected(message, function, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)

    rejected("pad_token_id", train_steps, make_model(pad_token_id=3), "initial", [PAIRS], [1])
    rejected("eval", sequence_logps, copy.deepcopy(model).train(), PAIRS, [1])
    for layer in (0, LAYERS + 1):
        rejected("is not in 1", sequence_logps, model, PAIRS, [layer])
    rejected("norm=", sequence_logps, model, PAIRS, [1], "pre")
    rejected("final layer 4", mean_losses, model, model, PAIRS, [LAYERS])
    rejected("twice", mean_losses, model, model, PAIRS, [1, 1])
    rejected("loss='dpo'", mean_losses, model, model, PAIRS, [1], loss="dpo")
    rejected("smoothing", mean_losses, model, model, PAIRS, [1], loss="ipo", label_smoothing=0.1)
