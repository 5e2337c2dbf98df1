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
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.oracle import losses, pair_losses, sequence_logps, train_steps

LAYERS, BETA, WEIGHT = 4, 0.3, 0.4
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
# Three pairs whose six sequences have different lengths; one response is a single token.
LENGTHS = ((3, 4, 2), (6, 1, 5), (2, 7, 3))

ROUNDING = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums in another order, over a few thousand operations."""
FP32_RELATIVE = 1e-5
"""Log-probabilities of some ten nats through four layers of fp32."""
LN2_ATOL = 1e-6
"""fp32, where policy and reference are the same computation."""
DIFFERENCE_RELATIVE = 1e-6
"""Central differences of step 1e-5 have an error of about 1e-10 of the third derivative."""


def make_model(*, tied=False, window=None, dtype=torch.float64, seed=0, **changes):
    """A random model of 4 layers; `window` makes it a Mistral with that sliding window.

    In float64 its norms are replaced: those of Transformers always compute in fp32.
    """
    torch.manual_seed(seed)
    sizes = SIZES | {"tie_word_embeddings": tied} | changes
    if window:
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones would hide a norm that is applied twice or not at all
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    if dtype == torch.float64:
        norms = [n for n, module in model.named_modules() if type(module).__name__.endswith("Norm")]
        for name in norms:
            exact = torch.nn.RMSNorm(SIZES["hidden_size"], eps=model.config.rms_norm_eps)
            exact.weight = model.get_submodule(name).weight
            model.set_submodule(name, exact)
    return model.to(dtype).eval()


def make_pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(48, (n,), generator=generator).tolist() for n in lengths)
        for lengths in LENGTHS
    ]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def models(request):
    """A policy and a reference that differ."""
    return make_model(tied=request.param), make_model(tied=request.param, seed=1)


@pytest.fixture
def model(models):
    return models[0]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def stock(request):
    """A model as Transformers creates it, in fp32."""
    return make_model(tied=request.param, dtype=torch.float32)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices are too small for several threads to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PAIRS = make_pairs()
ALL = range(1, LAYERS + 1)


def mean_losses(policy, reference, pairs, layers, *, beta=BETA, weight=WEIGHT, **options):
    read = [*layers, LAYERS]
    with torch.no_grad():
        reference_logps = reference and sequence_logps(reference, pairs, read)
    policy_logps = sequence_logps(policy, pairs, read)
    return losses(policy_logps, reference_logps, pairs, layers, beta, weight, **options)


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def assert_gradients_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, **ROUNDING, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_oracle_is_short_and_imports_nothing_of_the_package():
    source = (Path(__file__).parent / "oracle.py").read_text()
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


def test_invalid_arguments_are_rejected():
    model = make_model(dtype=torch.float32)

    def rejected(message, function, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)

    rejected("pad_token_id", train_steps, make_model(pad_token_id=3), "initial", BATCHES, [1])
    rejected("eval", sequence_logps, copy.deepcopy(model).train(), PAIRS, [1])
    for layer in (0, LAYERS + 1):
        rejected("is not in 1", sequence_logps, model, PAIRS, [layer])
    rejected("norm=", sequence_logps, model, PAIRS, [1], "pre")
    rejected("final layer 4", mean_losses, model, model, PAIRS, [LAYERS])
    rejected("twice", mean_losses, model, model, PAIRS, [1, 1])
    rejected("loss='dpo'", mean_losses, model, model, PAIRS, [1], loss="dpo")
    rejected("smoothing", mean_losses, model, model, PAIRS, [1], loss="ipo", label_smoothing=0.1)
