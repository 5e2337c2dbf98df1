"""`RowAttention` on a CPU against a dense mask and softmax in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.attention import sdpa
from megatron_idpo.mcore.attention.row_attention import RowAttention
from megatron_idpo.mcore.attention.row_params import RowParams

from .rows import MIXED, PLAIN, ROW_TOKENS, dealt_rows, make_row, row_structures, visible_pairs

# Largest difference, relative to the largest value of the fp64 result, or to 1, the size of the
# inputs, if that is larger (with one visible key dq is only rounding error). fp32: the kernels'
# online softmax sums in another order. bf16 (8 bits of mantissa): the inputs are equal, each stored
# result rounds by 2**-9 = 0.2 %, and the prompt's gradients are sums of three rounded terms.
FP32_TOLERANCE = 2e-6
BF16_TOLERANCE = 2e-2

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def dense_attention(query, key, value, visible, scale):
    """`[S, B, N, D]` attention with a dense mask; a query without keys outputs 0."""
    repeat = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(repeat, dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    scores = scores.masked_fill(~visible, -math.inf)
    weights = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


def make_inputs(tokens, dtype=torch.float32, batch=1, heads=HEADS, kv_heads=KV_HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, batch, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    shapes.append((tokens, batch, heads * HEAD_DIM))
    query, key, value, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return [query, key, value], grad


def with_gradients(attend, inputs, grad):
    """The output and dq, dk, dv."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = attend(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def expected_results(inputs, grad, visible, scale=HEAD_DIM**-0.5):
    def attend(query, key, value):
        return dense_attention(query, key, value, visible, scale)

    return with_gradients(attend, [x.double() for x in inputs], grad.double())


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for name, a, e in zip(("output", "dq", "dk", "dv"), actual, expected, strict=False):
        difference = (a.double() - e).abs().max().item()
        assert difference <= tolerance * max(e.abs().max().item(), 1.0), (name, difference)


def make_config(**overrides):
    settings = dict(
        num_layers=4,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
    )
    return TransformerConfig(**{**settings, **overrides})


def make_attention(window=None, layer_number=1, attn_mask_type=AttnMaskType.causal, **overrides):
    extra = {k: overrides.pop(k) for k in ("attention_dropout", "softmax_scale") if k in overrides}
    if window is not None:
        overrides["window_size"] = (window - 1, 0)
    return RowAttention(
        config=make_config(**overrides),
        layer_number=layer_number,
        attn_mask_type=attn_mask_type,
        attention_type="self",
        cp_comm_type=None,
        pg_collection=None,
        **extra,
    )


def row_results(row, inputs, grad, **arguments):
    attention = make_attention(**arguments)

    def attend(query, key, value):
        return attention(query, key, value, None, packed_seq_params=row)

    return with_gradients(attend, inputs, grad)


class TestRow:
    @pytest.mark.parametrize("window", [None, 1, 8, 100])
    @pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
    @pytest.mark.parametrize("groups", [MIXED, PLAIN], ids=["pairs", "plain"])
    def test_matches_dense_attention(self, groups, window, kv_heads):
        inputs, grad = make_inputs(ROW_TOKENS, kv_heads=kv_heads)
        actual = row_results(make_row(groups, ROW_TOKENS), inputs, grad, window=window)
        expected = expected_results(inputs, grad, visible_pairs(groups, ROW_TOKENS, window))
        assert actual[0].shape == (ROW_TOKENS, 1, HEADS * HEAD_DIM)
        assert_close(actual, expected, FP32_TOLERANCE)

    @pytest.mark.parametrize("window", [None, 3, 20])
    def test_result_does_not_depend_on_the_query_block_size(self, window, monkeypatch):
        monkeypatch.setattr(sdpa, "QUERY_BLOCK", 4)
        inputs, grad = make_inputs(ROW_TOKENS)
        actual = row_results(make_row(MIXED, ROW_TOKENS), inputs, grad, window=window)
        expected = expected_results(inputs, grad, visible_pairs(MIXED, ROW_TOKENS, window))
        assert_close(actual, expected, FP32_TOLERANCE)

    @pytest.mark.parametrize("window", [None, 3, 20])
    @pytest.mark.parametrize("ranks", [2, 4, 8])
    @pytest.mark.parametrize("query_block", [2, 64])
    def test_ranks_of_a_dealt_row_match_dense_attention(
        self, ranks, window, query_block, monkeypatch
    ):
        """Each with its own queries; the gradients of keys and values are summed over the ranks."""
        monkeypatch.setattr(sdpa, "DEALT_QUERY_BLOCK", query_block)
        rows = dealt_rows(MIXED, ROW_TOKENS, ranks)
        tokens = rows[0].row_tokens
        (query, key, value), grad = make_inputs(tokens)
        total = [torch.zeros(*grad.shape), *(torch.zeros_like(x) for x in (query, key, value))]
        for row in rows:
            own = torch.from_numpy(row.share.own_L)

            def attend(*inputs, row=row):
                scale = HEAD_DIM**-0.5
                return sdpa.attend_row(*inputs, row=row, scale=scale, window=window).flatten(2)

            output, *grads = with_gradients(attend, [query[own], key, value], grad[own])
            total[0][own], total[1][own] = output, grads[0]
            total[2] += grads[1]
            total[3] += grads[2]
        visible = visible_pairs(MIXED, tokens, window)
        assert_close(total, expected_results([query, key, value], grad, visible), FP32_TOLERANCE)

    def test_bf16_matches_dense_attention(self):
        inputs, grad = make_inputs(ROW_TOKENS, torch.bfloat16)
        actual = row_results(make_row(MIXED, ROW_TOKENS), inputs, grad)
        assert actual[0].dtype == torch.bfloat16
        expected = expected_results(inputs, grad, visible_pairs(MIXED, ROW_TOKENS, None))
        assert_close(actual, expected, BF16_TOLERANCE)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_fp32(self, dtype, monkeypatch):
        """Torch's half-precision CPU kernel leaks memory with every new shape."""
        kernel_dtypes = []

        def kernel(query, *others, **options):
            kernel_dtypes.append(query.dtype)
            return scaled_dot_product_attention(query, *others, **options)

        monkeypatch.setattr(sdpa, "scaled_dot_product_attention", kernel)
        inputs, grad = make_inputs(ROW_TOKENS, dtype)
        results = row_results(make_row(MIXED, ROW_TOKENS), inputs, grad)
        results = (*results, make_attention()(*inputs, None))
        assert {result.dtype for result in results} == {dtype}
        assert set(kernel_dtypes) == {torch.float32}

    def test_accepts_strided_views(self):
        """Megatron's value is a view of the fused projection's output."""
        inputs, grad = make_inputs(ROW_TOKENS)
        wide = [torch.cat([x, x], dim=-1) for x in inputs]
        row, attention = make_row(MIXED, ROW_TOKENS), make_attention()

        def attend(*tensors):
            halves = (x[..., HEAD_DIM:] for x in tensors)
            return attention(*halves, None, packed_seq_params=row)

        actual = with_gradients(attend, wide, grad)
        expected = row_results(row, inputs, grad)
        torch.testing.assert_close(actual[0], expected[0])
        for a, e in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(a[..., HEAD_DIM:], e)

    def test_padding_outputs_zero_and_gets_no_gradient_even_with_nan(self):
        inputs, grad = make_inputs(ROW_TOKENS)
        padding = ~visible_pairs(MIXED, ROW_TOKENS, None).any(-1)
        assert padding.sum() == 9
        for x in inputs:
            x[padding] = math.nan
        for result in row_results(make_row(MIXED, ROW_TOKENS), inputs, grad):
            assert (result[padding] == 0).all()
            assert result.isfinite().all()

    @pytest.mark.parametrize("groups", [[], [(3, 3, 3, 3)]], ids=["no group", "empty group"])
    def test_an_empty_row_outputs_zero_and_gets_zero_gradients(self, groups):
        inputs, grad = make_inputs(7)
        for x in inputs:
            x[2] = math.nan
        for result in row_results(make_row(groups, 7), inputs, grad):
            assert result is not None and (result == 0).all()

    def test_answers_do_not_see_each_other(self):
        inputs, _ = make_inputs(ROW_TOKENS)
        row, attention = make_row(MIXED, ROW_TOKENS), make_attention()
        before = attention(*inputs, None, packed_seq_params=row)
        for x in inputs[1:]:
            x[5:9] += 1.0  # keys and values of the first chosen answer
        changed = (attention(*inputs, None, packed_seq_params=row) != before).any(-1).flatten()
        assert changed.nonzero().flatten().tolist() == [5, 6, 7, 8]

    def test_softmax_scale_overrides_the_default(self):
        inputs, grad = make_inputs(ROW_TOKENS)
        actual = row_results(make_row(MIXED, ROW_TOKENS), inputs, grad, softmax_scale=0.7)
        visible = visible_pairs(MIXED, ROW_TOKENS, None)
        assert_close(actual, expected_results(inputs, grad, visible, 0.7), FP32_TOLERANCE)

    def test_masks_of_a_long_row_are_smaller_than_the_row(self):
        tokens, groups = 3000, [(0, 2000, 2500, 3000)]
        row, (inputs, _) = make_row(groups, tokens), make_inputs(tokens, heads=1, kv_heads=1)
        for window in (None, 700):
            sdpa.attend_row(*inputs, row=row, scale=1.0, window=window)
        block = sdpa.QUERY_BLOCK
        sizes = sorted(tuple(mask._matrix.shape) for mask in row.derived.values())
        assert sizes == [(block, 699 + block), (block, 2499 + block)]

    def test_recomputation_uses_the_original_row(self):
        """As in selective recomputation: the row is in a closure, another row runs in between."""
        from megatron.core.tensor_parallel import checkpoint

        from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
        rows = [make_row(MIXED, ROW_TOKENS), make_row(PLAIN, ROW_TOKENS)]
        attention = make_attention()
        inputs, grad = make_inputs(ROW_TOKENS)
        outputs, leaves = [], []
        for row in rows:
            leaves.append([x.detach().clone().requires_grad_() for x in inputs])

            def attend(query, key, value, row=row):
                return attention(query, key, value, None, packed_seq_params=row)

            outputs.append(checkpoint(attend, False, *leaves[-1]))
        for output in reversed(outputs):
            output.backward(grad)
        for row, own, output in zip(rows, leaves, outputs, strict=True):
            actual = [output.detach(), *(x.grad for x in own)]
            for a, e in zip(actual, row_results(row, inputs, grad), strict=True):
                assert torch.equal(a, e)

    def test_masks_built_in_inference_mode_work_in_training(self):
        inputs, grad = make_inputs(ROW_TOKENS)
        row, attention = make_row(MIXED, ROW_TOKENS), make_attention(window=3)
        with torch.inference_mode():
            attention(*inputs, None, packed_seq_params=row)
        assert all(r is not None for r in row_results(row, inputs, grad, window=3))


@settings(max_examples=40, deadline=None)
@given(row_structures(), st.one_of(st.none(), st.integers(1, 12)), st.sampled_from([2, 256]))
def test_any_row_structure_matches_dense_attention(structure, window, query_block):
    groups, tokens = structure
    inputs, grad = make_inputs(tokens, seed=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", query_block)
        actual = row_results(make_row(groups, tokens), inputs, grad, window=window)
    expected = expected_results(inputs, grad, visible_pairs(groups, tokens, window))
    assert_close(actual, expected, FP32_TOLERANCE)


class TestPlainCausal:
    @pytest.mark.parametrize("window", [None, 1, 3, 100])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_matches_dense_attention(self, batch, window):
        inputs, grad = make_inputs(19, batch=batch)
        attention = make_attention(window=window)
        actual = with_gradients(lambda q, k, v: attention(q, k, v, None), inputs, grad)
        expected = expected_results(inputs, grad, visible_pairs([(0, 19, 19, 19)], 19, window))
        assert_close(actual, expected, FP32_TOLERANCE)

    @pytest.mark.parametrize("window", [None, 4])
    @pytest.mark.parametrize("last", [1, 5])
    def test_queries_are_the_last_positions_of_a_key_value_cache(self, last, window):
        inputs, _ = make_inputs(19)
        attention = make_attention(window=window)
        full = attention(*inputs, None)
        mask_type = AttnMaskType.no_mask if last == 1 else AttnMaskType.causal
        cached = attention(inputs[0][-last:], *inputs[1:], None, attn_mask_type=mask_type)
        torch.testing.assert_close(cached, full[-last:])

    def test_a_plain_row_equals_causal_attention_without_a_row(self):
        inputs, grad = make_inputs(19)
        attention = make_attention()
        expected = with_gradients(lambda q, k, v: attention(q, k, v, None), inputs, grad)
        for a, e in zip(row_results(RowParams.plain(19), inputs, grad), expected, strict=True):
            assert torch.equal(a, e)


class TestConstruction:
    def test_window_depends_on_the_layer(self):
        overrides = dict(window_size=(4, 0), window_attn_skip_freq=[0, 1, 0, 1])
        windows = [make_attention(layer_number=n, **overrides).window for n in (1, 2, 3, 4)]
        assert windows == [None, 5, None, 5]
        assert make_attention(window_size=(-1, 0)).window is None

    def test_state_is_empty(self):
        attention = make_attention()
        assert attention.sharded_state_dict("core_attention.", (), {}) == {}
        assert attention.state_dict() == {}

    @pytest.mark.parametrize(
        ("overrides", "location"),
        [
            (dict(attention_dropout=0.1), "attention_dropout"),
            (dict(softmax_type="off-by-one"), "softmax_type"),
            (dict(window_size=(3, 2)), "window_size"),
            (dict(attn_mask_type=AttnMaskType.padding), "attn_mask_type"),
        ],
    )
    def test_unsupported_settings_are_rejected(self, overrides, location):
        with pytest.raises(ConfigError, match=location):
            make_attention(**overrides)

    def test_all_problems_are_reported_together(self):
        config = make_config(attention_dropout=0.2)
        config.qk_clip = True
        with pytest.raises(ConfigError) as error:
            RowAttention(config, 1, AttnMaskType.causal, "self")
        for message in ("attention_dropout: is 0.2", "qk_clip"):
            assert message in str(error.value)

    @pytest.mark.parametrize(
        ("location", "arguments"),
        [
            ("attention_mask", dict(attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))),
            ("attention_bias", dict(attention_bias=torch.zeros(3, 3))),
            ("attn_mask_type", dict(attn_mask_type=AttnMaskType.no_mask)),
            ("packed_seq_params", dict(packed_seq_params=PackedSeqParams(qkv_format="thd"))),
            ("packed_seq_params", dict(packed_seq_params=dealt_rows([(0, 1, 2, 3)], 4, 2)[0])),
        ],
    )
    def test_unsupported_forward_arguments_are_rejected(self, location, arguments):
        inputs, _ = make_inputs(3)
        with pytest.raises(ConfigError, match=location):
            make_attention()(*inputs, **{"attention_mask": None, **arguments})


@pytest.mark.distributed
def test_a_row_dealt_for_another_rank_is_rejected(workers):
    """Attention would take this rank's keys for those of the other one's positions."""
    first, second = workers.run(attend_as_the_other_rank, 2)
    assert "positions of context-parallel rank 1, but this is rank 0" in first
    assert "positions of context-parallel rank 0, but this is rank 1" in second
    assert "context=dpo.context" in first


def attend_as_the_other_rank():
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout(context=2))
    row = dealt_rows([(0, 1, 2, 3)], 4, 2)[1 - torch.distributed.get_rank()]
    inputs, _ = make_inputs(2)
    try:
        make_attention(context_parallel_size=2)(*inputs, None, packed_seq_params=row)
    except ConfigError as error:
        return str(error)
    return "accepted"
