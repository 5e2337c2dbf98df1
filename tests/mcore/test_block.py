"""The places where a chunk is entered: they hand out what was there, and are put back."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

NUM_LAYERS, VOCAB, TOKENS = 4, 51, 8
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
    "runs": {"recompute_method": "uniform", "recompute_num_layers": 2},
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

    row = RowParams.plain(TOKENS)
    tokens_1T = torch.arange(TOKENS)[None]
    return chunk(tokens_1T, row.position_ids_T[None], None, packed_seq_params=row, **kwargs)


# ---- taps ----------------------------------------------------------------------------------------


def tapped(recompute: str) -> None:
    """Taps hand out what layers return, in ascending order, once in a forward pass."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model.chunk import tap_layers
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    (chunk,) = build(layout, recompute)
    wanted = [4, 2] if recompute == "runs" else [3, 1]
    returned: dict[int, Any] = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, _, out: returned.__setitem__(module.layer_number, out[0].detach())
        )
        for layer in chunk.decoder.layers
    ]
    logits = forward(chunk).detach()
    for hook in hooks:
        hook.remove()
    calls: list[dict[int, Any]] = []

    def on_taps(output: Any, hidden: dict[int, Any], packed: Any) -> Any:
        assert isinstance(packed, RowParams)
        assert all(one.requires_grad for one in hidden.values())
        calls.append({layer: one.detach().clone() for layer, one in hidden.items()})
        return output

    undo = tap_layers(chunk, wanted, on_taps)
    again = forward(chunk)
    assert torch.equal(again.detach(), logits)
    again.sum().backward()
    assert len(calls) == 1, "recomputation must not be seen"
    assert list(calls[0]) == sorted(wanted)
    for layer, hidden in calls[0].items():
        assert torch.equal(hidden, returned[layer]), f"layer {layer}"
    undo()
    assert "forward" not in vars(chunk.decoder)
    forward(chunk)
    assert len(calls) == 1


def changed_output() -> None:
    """What a tap returns is what is passed on; what is passed on is no view."""
    from megatron_idpo.mcore.model.chunk import chunk_layer_numbers, is_hooked, tap_layers
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout(pipeline=2)
    start_layout(layout)
    (chunk,) = build(layout)
    first = torch.distributed.get_rank() == 0
    assert chunk_layer_numbers(chunk) == ([1, 2] if first else [3, 4])
    assert not is_hooked(chunk)
    chunk.decoder.set_input_tensor(torch.ones(TOKENS, 1, SIZES["hidden_size"]))
    before = forward(chunk)
    undo = tap_layers(chunk, [1 if first else 3], lambda out, *_: (2 * out).view_as(out))
    assert is_hooked(chunk)
    if first:
        passed_on = forward(chunk)
        assert torch.equal(passed_on, 2 * before)
        assert passed_on._base is None and passed_on.requires_grad
    undo()
    assert not is_hooked(chunk)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_taps_hand_out_layers_once(workers, recompute):
    workers.run(tapped, 1, recompute)


def test_what_is_passed_on(workers):
    workers.run(changed_output, 2)


# ---- the output layer and the embedding ----------------------------------------------------------


def output_layer() -> None:
    """Only calls with targets are ours; the module's hooks run for them all."""
    from megatron_idpo.mcore.model.chunk import is_hooked, override_output_layer
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    (chunk,) = build(layout)
    logits = forward(chunk)
    asked: list[Any] = []
    undo = override_output_layer(chunk, lambda hidden, targets: asked.append(targets) or hidden * 0)
    entered: list[int] = []
    hook = chunk.output_layer.register_forward_pre_hook(lambda *_: entered.append(1))
    assert is_hooked(chunk)
    assert torch.equal(forward(chunk), logits), "an ordinary forward gives logits as before"

    def processor(*, hidden_states: Any, output_layer: Any, **_: Any) -> Any:
        return output_layer(hidden_states, response_targets="ours")

    answer = forward(chunk, output_processor=processor)
    assert not answer.any() and asked == ["ours"] and len(entered) == 2
    hook.remove()
    undo()
    assert not is_hooked(chunk) and torch.equal(forward(chunk), logits)


def frozen_embedding() -> None:
    """A frozen embedding's output asks for a gradient, in training only."""
    from megatron_idpo.mcore.model.chunk import enable_embedding_output_grad
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    (chunk,) = build(layout, "block")
    chunk.embedding.requires_grad_(False)
    chunk.decoder.layers[0].self_attention.linear_qkv.weight.requires_grad_()
    undo = enable_embedding_output_grad(chunk)
    forward(chunk).sum().backward()
    gradient = chunk.decoder.layers[0].self_attention.linear_qkv.weight.grad
    assert gradient is not None and gradient.any(), "the first layer learned nothing"
    seen: list[bool] = []
    hook = chunk.embedding.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    with torch.no_grad():
        forward(chunk)
    undo()
    with torch.enable_grad():
        chunk.embedding(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    hook.remove()
    assert seen == [False, False]


def test_the_output_layer_answers_targets_and_everybody_else(workers):
    workers.run(output_layer, 1)


def test_gradients_reach_the_first_layers_behind_a_frozen_embedding(workers):
    workers.run(frozen_embedding, 1)


# ---- sequence parallelism ------------------------------------------------------------------------


def gathered() -> None:
    """The whole row on every rank; backward adds up what the ranks' partial gradients are."""
    import torch.distributed as dist

    from megatron_idpo.mcore.model.chunk import gather_positions
    from megatron_idpo.mcore.parallel.groups import start_layout, tensor_group

    start_layout(Layout(tensor=2, sequence_parallel=True))
    rank = dist.get_rank()
    shard_t1H = (torch.arange(6.0).reshape(2, 1, 3) + 10 * rank).requires_grad_()
    whole_T1H = gather_positions(shard_t1H, tensor_group())
    assert whole_T1H[:, 0, 0].tolist() == [0.0, 3.0, 10.0, 13.0]
    whole_T1H.backward(torch.full_like(whole_T1H, 1.0 + rank))
    assert (shard_t1H.grad == 3.0).all()


def test_positions_are_gathered_and_gradients_added_up(workers):
    workers.run(gathered, 2)
