"""Patches of a model chunk: what taps and the output layer receive, and that they are undone."""

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

    row = RowParams.plain(TOKENS)
    tokens_1T = torch.arange(TOKENS)[None]
    return chunk(tokens_1T, row.position_ids_T[None], None, packed_seq_params=row, **kwargs)


# ---- taps ----------------------------------------------------------------------------------------


def tapped(recompute: str) -> None:
    """Taps receive the layers' outputs, in ascending order, once per forward pass."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model.chunk import tap_layers
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    (chunk,) = build(layout, recompute)
    layers = [4, 2] if recompute == "uniform-2" else [3, 1]
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
        assert all(output.requires_grad for output in hidden.values())
        calls.append({layer: output.detach().clone() for layer, output in hidden.items()})
        return output

    restore = tap_layers(chunk, layers, on_taps)
    again = forward(chunk)
    assert torch.equal(again.detach(), logits)
    again.sum().backward()
    assert len(calls) == 1, "recomputation must not call on_taps"
    assert list(calls[0]) == sorted(layers)
    for layer, hidden in calls[0].items():
        assert torch.equal(hidden, returned[layer]), f"layer {layer}"
    restore()
    assert "forward" not in vars(chunk.decoder)
    forward(chunk)
    assert len(calls) == 1


def changed_output() -> None:
    """The chunk outputs the tensor that `on_taps` returned, and never a view."""
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
    restore = tap_layers(chunk, [1 if first else 3], lambda out, *_: (2 * out).view_as(out))
    assert is_hooked(chunk)
    if first:
        passed_on = forward(chunk)
        assert torch.equal(passed_on, 2 * before)
        assert passed_on._base is None and passed_on.requires_grad
    restore()
    assert not is_hooked(chunk)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_taps_receive_each_layer_once_per_forward_pass(workers, recompute):
    workers.run(tapped, 1, recompute)


def test_the_result_of_taps_is_the_chunks_output_and_not_a_view(workers):
    workers.run(changed_output, 2)


# ---- the output layer and the embedding ----------------------------------------------------------


def output_layer() -> None:
    """Only calls with targets are overridden; the module's hooks run for all calls."""
    from megatron_idpo.mcore.model.chunk import is_hooked, override_output_layer
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout()
    start_layout(layout)
    (chunk,) = build(layout)
    logits = forward(chunk)
    targets_seen: list[Any] = []
    restore = override_output_layer(
        chunk, lambda hidden, targets: targets_seen.append(targets) or hidden * 0
    )
    hook_calls: list[int] = []
    hook = chunk.output_layer.register_forward_pre_hook(lambda *_: hook_calls.append(1))
    assert is_hooked(chunk)
    assert torch.equal(forward(chunk), logits), "a call without targets returns logits"

    def processor(*, hidden_states: Any, output_layer: Any, **_: Any) -> Any:
        return output_layer(hidden_states, response_targets="targets")

    output = forward(chunk, output_processor=processor)
    assert not output.any() and targets_seen == ["targets"] and len(hook_calls) == 2
    hook.remove()
    restore()
    assert not is_hooked(chunk) and torch.equal(forward(chunk), logits)


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


def test_output_layer_override_applies_to_calls_with_targets_only(workers):
    workers.run(output_layer, 1)


def test_gradients_reach_the_first_layers_after_a_frozen_embedding(workers):
    workers.run(frozen_embedding, 1)


# ---- sequence parallelism ------------------------------------------------------------------------


def gather_row() -> None:
    """Forward: the whole row on every rank. Backward: the sum of the ranks' partial gradients."""
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


def test_positions_are_gathered_and_their_gradients_summed(workers):
    workers.run(gather_row, 2)
