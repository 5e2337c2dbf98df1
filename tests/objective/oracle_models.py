"""Tiny random models and pairs, and the oracle's losses of them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.oracle import losses, sequence_logps

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
