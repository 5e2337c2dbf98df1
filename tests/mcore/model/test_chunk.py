"""Taps on a model chunk, the carried batch, the embedding; that all is undone."""

from functools import partial
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

NUM_LAYERS, VOCAB, TOKENS = 4, 51, 8

GRADIENT_RELATIVE = 1e-5
"""|difference| / |gradient|: fp32 sums in another order."""

SIZES = {
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
RECOMPUTE = {
    "off": {},
    "uniform": {"recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform-2": {"recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_method": "block", "recompute_num_layers": 1},
}


def build(layout: Layout, recompute: str = "off") -> list[Any]:
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model

    fields = RECOMPUTE[recompute]
    overrides = {"recompute_granularity": "full", **fields} if fields else {}
    architecture = Architecture.from_hf(tiny_hf_config("llama", **SIZES))
    chunks = build_model(architecture, layout, ModelOptions(overrides=overrides))
    generator = torch.Generator().manual_seed(1)
    for chunk in chunks:
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise + float(parameter.dim() == 1))
    return chunks


def forward(chunk: Any, **kwargs: Any) -> Any:
    from megatron_idpo.mcore.attention.row_params import RowParams

    kwargs = {"packed_seq_params": RowParams.plain(TOKENS), **kwargs}
    tokens_1T = torch.arange(TOKENS)[None]
    return chunk(tokens_1T, tokens_1T, None, **kwargs)


# ---- taps ----------------------------------------------------------------------------------------


def install(chunk: Any, taps: Any, **callbacks: Any) -> Any:
    from megatron_idpo.mcore.model.tap import install_taps

    read_final = callbacks.get("read_final", lambda hidden, batch: hidden.sum((0, 1))[:3])
    return install_taps(chunk, taps, read_final, callbacks.get("on_call", lambda *_: None))


def carried(batch: Any) -> Any:
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model.tap import CarriedBatch

    return {"packed_seq_params": CarriedBatch.of(batch, RowParams.plain(TOKENS), TOKENS)}


FACTORS = {1: 1.0, 2: 10.0, 3: 100.0}
"""The loss at a tap is this times the sum of squares."""


def gradients_of(chunk: Any) -> dict[str, Any]:
    return {name: p.grad for name, p in chunk.named_parameters() if p.grad is not None}


def one_loss() -> dict[str, Any]:
    """Gradients of the sum of all losses."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    (chunk,) = build(Layout())
    hidden: dict[int, Any] = {}
    for layer in chunk.decoder.layers:
        layer.register_forward_hook(
            lambda module, _, out: hidden.__setitem__(module.layer_number, out[0])
        )
    forward(chunk)
    loss = sum(factor * hidden[layer].square().sum() for layer, factor in FACTORS.items())
    # The final layer reads the hidden state after the final norm.
    final = chunk.decoder.final_layernorm(hidden[NUM_LAYERS]).sum((0, 1))[:3].sum()
    (loss + final).backward()
    return gradients_of(chunk)


def with_taps(recompute: str) -> dict[str, Any]:
    """The same with taps; each is evaluated once, in the backward pass, on a detached tensor."""
    from megatron_idpo.mcore.model.tap import evaluate_in_backward
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    (chunk,) = build(Layout(), recompute)
    evaluated: list[tuple[int, bool]] = []

    def on_tap(layer: int, out: Any, batch: str, evaluates_now: bool) -> Any:
        assert not evaluates_now and batch == "batch"

        def evaluate(hidden: Any) -> Any:
            evaluated.append((layer, hidden.is_leaf and torch.is_grad_enabled()))
            return FACTORS[layer] * hidden.square().sum()

        return evaluate_in_backward(out, evaluate) if torch.is_grad_enabled() else out

    restore = install(chunk, {layer: partial(on_tap, layer) for layer in FACTORS})
    output = forward(chunk, **carried("batch"))
    assert output.shape == (3,) and not evaluated
    output.sum().backward()
    assert sorted(evaluated) == [(layer, True) for layer in FACTORS]
    restore()
    assert forward(chunk).shape == (1, TOKENS, VOCAB)
    return gradients_of(chunk)


def passes_on() -> None:
    """Below a layer everything gets what the caller passed; other calls are as before."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model.tap import CarriedBatch, is_tapped
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    (chunk,) = build(Layout())
    logits = forward(chunk)
    seen: list[Any] = []
    for layer in chunk.decoder.layers:
        layer.self_attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["packed_seq_params"]), with_kwargs=True
        )
    calls: list[Any] = []
    taps: list[Any] = []
    restore = install(
        chunk,
        {2: lambda out, batch, now: taps.append((batch, now)) or out},
        on_call=lambda *call: calls.append(call),
    )
    assert is_tapped(chunk)
    assert torch.equal(forward(chunk), logits) and not calls and not taps
    row = RowParams.plain(TOKENS)
    argument = CarriedBatch.of("batch", row, TOKENS)
    assert argument.position_ids_T is row.position_ids_T
    assert (argument.qkv_format, argument.max_seqlen_q) == ("sbhd", TOKENS)
    tokens_1T = torch.arange(TOKENS)[None]
    seen.clear()
    with torch.no_grad():
        chunk(tokens_1T, tokens_1T, None, packed_seq_params=argument, labels=tokens_1T)
    assert len(seen) == NUM_LAYERS and all(value is row for value in seen)
    assert taps == [("batch", True)]
    ((batch, original, tokens),) = calls
    assert batch == "batch" and original is row and tokens is tokens_1T
    neutral = CarriedBatch.of("batch", None, 16)
    assert neutral.original is None and neutral.cu_seqlens_q is None
    assert (neutral.qkv_format, neutral.max_seqlen_q, neutral.max_seqlen_kv) == ("sbhd", 16, 16)
    restore()
    assert not is_tapped(chunk) and torch.equal(forward(chunk), logits)
    assert all("forward" not in vars(module) for module in chunk.modules())


def last_layer_of_a_stage() -> None:
    """A stage sends an output that is not a view, and hooks of the output layer still run."""
    from megatron_idpo.mcore.model.chunk import layers_by_number
    from megatron_idpo.mcore.model.tap import evaluate_in_backward, is_tapped
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout(pipeline=2)
    start_layout(layout)
    (chunk,) = build(layout)
    first = torch.distributed.get_rank() == 0
    assert list(layers_by_number(chunk)) == ([1, 2] if first else [3, 4])
    received = torch.ones(TOKENS, 1, SIZES["hidden_size"], requires_grad=True)
    chunk.decoder.set_input_tensor(received)
    hooks: list[int] = []
    if not first:
        chunk.output_layer.register_forward_pre_hook(lambda *_: hooks.append(1))
    taps = {2: lambda out, *_: evaluate_in_backward(out, lambda h: h.sum())} if first else {}
    restore = install(chunk, taps)
    assert is_tapped(chunk)
    output = forward(chunk, **carried("batch"))
    assert output._base is None or not first
    assert output.requires_grad and output.shape == ((TOKENS, 1, 32) if first else (3,))
    assert first or hooks == [1]
    restore()
    assert not is_tapped(chunk)


def test_gradients_of_taps_equal_one_loss_under_every_recompute_method(workers):
    (expected,) = workers.run(one_loss, 1)
    for recompute in RECOMPUTE:
        (gradients,) = workers.run(with_taps, 1, recompute)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            relative = (gradients[name] - gradient).norm() / gradient.norm()
            assert relative <= GRADIENT_RELATIVE, f"{recompute} {name}: {relative:.1e}"


def test_layers_get_what_the_caller_passed(workers):
    workers.run(passes_on, 1)


def test_a_tap_on_the_last_layer_of_a_stage_can_be_sent(workers):
    workers.run(last_layer_of_a_stage, 2)


def test_tap_without_gradient_is_rejected():
    from megatron_idpo.mcore.model.tap import evaluate_in_backward

    with pytest.raises(AssertionError, match="needs no gradient"):
        evaluate_in_backward(torch.zeros(2), lambda hidden: hidden.sum())


# ---- the embedding -------------------------------------------------------------------------------


def frozen_embedding() -> None:
    """A frozen embedding's output requires a gradient, in training only."""
    from megatron_idpo.mcore.model.chunk import enable_embedding_output_grad
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    (chunk,) = build(layout, "block")
    chunk.embedding.requires_grad_(False)
    chunk.decoder.layers[0].self_attention.linear_qkv.weight.requires_grad_()
    restore = enable_embedding_output_grad(chunk)
    forward(chunk).sum().backward()
    gradient = chunk.decoder.layers[0].self_attention.linear_qkv.weight.grad
    assert gradient is not None and gradient.any(), "the first layer got no gradient"
    seen: list[bool] = []
    hook = chunk.embedding.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    with torch.no_grad():
        forward(chunk)
    restore()
    with torch.enable_grad():
        chunk.embedding(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    hook.remove()
    assert seen == [False, False]


def test_gradients_reach_the_first_layers_after_a_frozen_embedding(workers):
    workers.run(frozen_embedding, 1)


# ---- sequence parallelism ------------------------------------------------------------------------


def gather_row() -> None:
    """Forward: the whole row on every rank. Backward: the sum of the ranks' partial gradients."""
    import torch.distributed as dist

    from megatron_idpo.mcore.model.chunk import gather_positions
    from megatron_idpo.mcore.parallel.groups import ModelGroups, start_layout

    start_layout(Layout(tensor=2, sequence_parallel=True))
    rank = dist.get_rank()
    shard_t1H = (torch.arange(6.0).reshape(2, 1, 3) + 10 * rank).requires_grad_()
    whole_T1H = gather_positions(shard_t1H, ModelGroups.of().tensor)
    assert whole_T1H[:, 0, 0].tolist() == [0.0, 3.0, 10.0, 13.0]
    whole_T1H.backward(torch.full_like(whole_T1H, 1.0 + rank))
    assert (shard_t1H.grad == 3.0).all()


def test_positions_are_gathered_and_their_gradients_summed(workers):
    workers.run(gather_row, 2)
