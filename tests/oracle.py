"""Reference implementation of intermediate DPO (Kojima 2024, arXiv 2408.02923) for the tests.

The method on a Hugging Face causal language model: every sequence runs as prompt plus response, all
hidden states are kept, and autograd computes the gradients. It shares no code with the package and
has no packed rows, ranks or Megatron. Not included: efficiency, LoRA, auxiliary losses.

Layers count from 1: layer l is the output of the l-th transformer layer, layer L the final one.
Shapes: P pairs, 2P sequences (2p chosen, 2p + 1 rejected), S sequences of one forward, T tokens of
the longest of them, N tokens of one response, H hidden size, V vocabulary.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import batched
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu
from torch.nn.utils.rnn import pad_sequence

Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # tokens: prompt, chosen, rejected


def head_input(hidden_states: Sequence[Tensor], layer: int, final_norm: Any, norm: str) -> Tensor:
    """The input of the output projection at `layer`, [S, T, H].

    Transformers returns L + 1 entries: 0 is the embedding, l < L the output of layer l, and L that
    of the final norm, which therefore must not be applied to it again.
    """
    final = len(hidden_states) - 1
    if not 1 <= layer <= final or norm not in ("final", "none"):
        raise ValueError(f"layer {layer} is not in 1..{final}, or {norm=} not 'final' or 'none'")
    hidden_STH = hidden_states[layer]
    return hidden_STH if layer == final or norm == "none" else final_norm(hidden_STH)


def head_output(model: Any, hidden_NH: Tensor) -> Tensor:
    """The logits, [N, V]; Granite divides them, Gemma caps them (Transformers' modeling files)."""
    logits_NV = model.lm_head(hidden_NH) / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def sequence_logps(
    model: Any,
    sequences: Sequence[Pair],
    layers: Iterable[int],
    norm: str = "final",
    sequences_per_forward: int | None = None,
) -> dict[int, Tensor]:
    """log π_l(y|x) = Σ_t log softmax(lm_head(norm(h_l)))[y_t] over the response tokens, by layer.

    `norm` "none" leaves the final norm out at intermediate layers. `sequences_per_forward` 1 runs
    each sequence alone, more are padded on the right and masked; None pads all 2P together.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval()")
    responses = [(list(x), list(y)) for x, *both in sequences for y in both]
    logps: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for group in batched(responses, sequences_per_forward or len(responses)):
        tokens = [torch.tensor(x + y) for x, y in group]
        tokens_ST = pad_sequence(tokens, batch_first=True)
        mask_ST = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
        hidden_states = model.model(
            tokens_ST, attention_mask=mask_ST, output_hidden_states=True, use_cache=False
        ).hidden_states
        for layer in logps:
            hidden_STH = head_input(hidden_states, layer, model.model.norm, norm)
            for s, (x, y) in enumerate(group):
                # Position t predicts token t + 1: the last prompt token predicts the first of y.
                hidden_NH = hidden_STH[s, len(x) - 1 : len(x) + len(y) - 1]
                logps_NV = torch.log_softmax(head_output(model, hidden_NH), dim=-1)
                logps[layer].append(logps_NV[torch.arange(len(y)), torch.tensor(y)].sum())
    return {layer: torch.stack(logps_2P) for layer, logps_2P in logps.items()}


def pair_losses(
    logratio_2P: Tensor, lengths_2P: Tensor, beta: float, loss: str, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each pair, [P], from log π(y|x) − log π_ref(y|x) of both its responses.

    Variants and normalization are TRL's (`trl/trainer/dpo_trainer.py`, `_compute_loss`).
    """
    if loss in ("ipo", "sigmoid_norm"):  # these compare means over tokens, the others sums
        logratio_2P = logratio_2P / lengths_2P
    difference_P = logratio_2P[0::2] - logratio_2P[1::2]
    right_P, wrong_P = -logsigmoid(beta * difference_P), -logsigmoid(-beta * difference_P)
    eps = label_smoothing
    match loss:
        case "sigmoid" | "sigmoid_norm":  # DPO (2305.18290) Eq. 7; smoothed: cDPO (Mitchell) Eq. 3
            return (1 - eps) * right_P + eps * wrong_P
        case "robust":  # rDPO (2403.00409): unbiased where a share eps of the labels is flipped
            return ((1 - eps) * right_P - eps * wrong_P) / (1 - 2 * eps)
        case "ipo" if not eps:  # IPO (2310.12036) Eq. 17
            return (difference_P - 1 / (2 * beta)) ** 2
        case "hinge" if not eps:  # SLiC's hinge on normalised likelihoods, RSO (2309.06657)
            return relu(1 - beta * difference_P)
    raise ValueError(f"unknown combination {loss=}, {label_smoothing=}")


class Losses(NamedTuple):
    """Eq. 3; Eq. 1 at each layer; β (log-ratio of chosen − log-ratio of rejected) there, [P]."""

    total: Tensor
    by_layer: dict[int, Tensor]
    margins: dict[int, Tensor]


def losses(
    policy_logps: Mapping[int, Tensor],
    reference_logps: Mapping[int, Tensor] | None,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    beta: float,
    intermediate_weight: float,
    loss: str = "sigmoid",
    layer_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    reference_layer: str = "same",
) -> Losses:
    """Eq. 1–3 over the given pairs, which are one global batch.

    Both `_logps` have `layers` and the final layer; reference None is all zeros. Empty `layers` is
    plain DPO. `layer_weights`, one per layer, are normalized (None: the mean). `nll_weight` times
    −log π_l(y_w|x) per token of y_w is added to each pair's loss at every layer (Pang et al. 2024,
    2404.19733, Eq. 1). `reference_layer` "final" compares all layers with the reference's last.
    """
    final = max(policy_logps)
    if final in layers or len(set(layers)) < len(layers):
        raise ValueError(f"{layers=} name the final layer {final}, or a layer twice")
    lengths_2P = torch.tensor([len(y) for _, *both in pairs for y in both])
    by_layer, margins = {}, {}
    for layer in [*layers, final]:
        logratio_2P = policy_2P = policy_logps[layer]
        if reference_logps is not None:
            read = {"same": layer, "final": final}[reference_layer]
            logratio_2P = policy_2P - reference_logps[read].detach()
        loss_P = pair_losses(logratio_2P, lengths_2P, beta, loss, label_smoothing)
        by_layer[layer] = (loss_P - nll_weight * (policy_2P / lengths_2P)[0::2]).mean()  # Eq. 1
        margins[layer] = beta * (logratio_2P[0::2] - logratio_2P[1::2]).detach()
    if not layers:
        return Losses(by_layer[final], by_layer, margins)
    α = dict(zip(layers, layer_weights or [1.0] * len(layers), strict=True))
    intermediate = sum(α[k] * by_layer[k] for k in layers) / sum(α[k] for k in layers)  # Eq. 2
    w = intermediate_weight
    return Losses((1 - w) * by_layer[final] + w * intermediate, by_layer, margins)  # Eq. 3


def train_steps(
    model: Any,
    reference: Any,
    batches: Sequence[Sequence[Pair]],
    layers: Sequence[int],
    *,
    beta: float = 0.1,
    intermediate_weight: float = 0.1,
    optimizer: str = "sgd",
    lr: float = 1e-2,
    eps: float = 1e-4,
    frozen_head: bool = False,
    trainable: str = "",
    steps: int = 3,
    norm: str = "final",
    sequences_per_forward: int | None = None,
    **objective: Any,
) -> dict[str, Any]:
    """Optimizer steps on a copy of `model`, one global batch each; batches repeat cyclically.

    `reference` is another model, "initial" (`model` before step 1) or None. `optimizer` is "sgd"
    (no momentum) or "adam" (betas 0.9, 0.999), neither with weight decay. `frozen_head` does not
    train embedding, output projection and final norm; of the others, only parameters whose name
    matches `trainable` are trained. Other arguments go to `sequence_logps` and `losses`.

    Returns `losses`, one `Losses` per step, and by parameter name the `gradients` of step 1 (if
    trained) and the final `weights`. Tied weights have the embedding's name.
    """
    if model.get_input_embeddings().padding_idx is not None:
        raise ValueError("config.pad_token_id freezes its embedding; build the model without it")
    policy = copy.deepcopy(model).eval()
    reading = ([*layers, policy.config.num_hidden_layers], norm, sequences_per_forward)
    fixed_model = policy if reference == "initial" else reference
    with torch.no_grad():  # all before step 1, because "initial" is the model before training
        references = [fixed_model and sequence_logps(fixed_model, b, *reading) for b in batches]
    head = (policy.model.embed_tokens, policy.lm_head, policy.model.norm) if frozen_head else ()
    frozen = {parameter for module in head for parameter in module.parameters()}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(parameter not in frozen and bool(re.search(trainable, name)))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    kinds = {"sgd": torch.optim.SGD, "adam": partial(torch.optim.Adam, eps=eps)}
    update = kinds[optimizer](trained.values(), lr=lr)
    run: dict[str, Any] = {"losses": []}
    for step in range(steps):
        pairs, fixed = batches[step % len(batches)], references[step % len(batches)]
        logps = sequence_logps(policy, pairs, *reading)
        result = losses(logps, fixed, pairs, layers, beta, intermediate_weight, **objective)
        update.zero_grad()
        result.total.backward()
        if step == 0:
            run["gradients"] = {name: p.grad.clone() for name, p in trained.items()}
        update.step()
        by_layer = {layer: loss.detach() for layer, loss in result.by_layer.items()}
        run["losses"].append(Losses(result.total.detach(), by_layer, result.margins))
    return run | {"weights": {name: p.detach().clone() for name, p in policy.named_parameters()}}
