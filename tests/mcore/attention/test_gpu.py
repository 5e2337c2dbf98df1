"""`RowAttention` on a GPU (compiled FlexAttention) against itself on the CPU (SDPA on slices).

Also each context-parallel rank's part of a dealt row. The reference is the CPU backend, which
`test_row_attention.py` compares with a dense mask.
"""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_idpo.mcore.attention import flex
from megatron_idpo.mcore.attention.row_attention import RowAttention
from megatron_idpo.mcore.attention.row_params import RowParams

from .rows import dealt_rows, make_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS, KV_HEADS, HEAD_DIM, ROW_TOKENS = 8, 2, 64, 1111
PAIRS = [(0, 200, 331, 400), (400, 410, 430, 470), (500, 801, 801, 1000), (1000, 1001, 1002, 1003)]
PLAIN = [(0, 300, 300, 300), (300, 301, 301, 301), (310, 1000, 1000, 1000)]

# Largest difference over largest value. fp32 GEMMs run in IEEE fp32 (TF32 off) and sum in another
# order; bf16 also rounds the softmax weights and every stored result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _fresh_compiler_without_tf32():
    torch.compiler.reset()  # all parameters together would reach the recompilation limit
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make_attention(window):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
    )
    return RowAttention(config, 1, AttnMaskType.causal, "self")


def make_inputs(dtype, tokens=ROW_TOKENS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, 1, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
    shapes.append((tokens, 1, HEADS * HEAD_DIM))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(attention, row, tensors, device, dtype):
    """The output, dq, dk and dv, on the CPU in fp32."""
    *inputs, grad = (x.to(device, dtype) for x in tensors)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = attention(*leaves, None, packed_seq_params=row)
    output.backward(grad)
    return [x.detach().float().cpu() for x in (output, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
@pytest.mark.parametrize("groups", [PAIRS, PLAIN], ids=["pairs", "plain"])
def test_matches_the_cpu_backend(groups, window, dtype):
    tensors, attention = make_inputs(dtype), make_attention(window)
    expected = results(
        attention, make_row(groups, ROW_TOKENS, "cpu"), tensors, "cpu", torch.float32
    )
    actual = results(attention, make_row(groups, ROW_TOKENS, "cuda"), tensors, "cuda", dtype)
    for name, a, e in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        difference = (a - e).abs().max().item()
        assert difference <= TOLERANCES[dtype] * max(e.abs().max().item(), 1.0), (name, difference)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("tokens", "ranks"),
    # The first is not rehearsed on a phantom GPU, where attention is dense (`tools/gpu.py`).
    [(4096, 2), (1024, 4), (256, 4)],
    ids=["quadratic, blocks of 128", "blocks of 16", "64 positions"],
)
def test_parts_of_a_dealt_row_match_the_whole_row(tokens, ranks, window, dtype):
    """Each context-parallel rank's rectangle in turn; keys get the sum of the ranks' gradients."""
    groups = [
        tuple(int(part * tokens) for part in parts)
        for parts in ((0, 0.4, 0.55, 0.7), (0.71, 0.75, 0.8, 0.95))
    ]
    tensors, attention = make_inputs(dtype, tokens), make_attention(window)
    expected = results(attention, make_row(groups, tokens, "cpu"), tensors, "cpu", torch.float32)
    query, key, value, grad = (x.to("cuda", dtype) for x in tensors)
    actual = [torch.zeros_like(e) for e in expected]
    for row in dealt_rows(groups, tokens, ranks, "cuda"):
        own = torch.from_numpy(row.share.own_L)
        leaves = [x.clone().requires_grad_() for x in (query[own.cuda()], key, value)]
        settings = {"scale": attention.softmax_scale, "window": window}
        output = flex.attend_row_flex(*leaves, row=row, **settings).flatten(2)
        output.backward(grad[own.cuda()])
        actual[0][own], actual[1][own] = output.detach().float().cpu(), leaves[0].grad.float().cpu()
        for summed, leaf in zip(actual[2:], leaves[1:], strict=True):
            summed += leaf.grad.float().cpu()
    for name, a, e in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        difference = (a - e).abs().max().item()
        assert difference <= TOLERANCES[dtype] * max(e.abs().max().item(), 1.0), (name, difference)


@pytest.mark.parametrize("groups", [PAIRS, []], ids=["padding", "empty row"])
def test_padding_outputs_zero_and_gets_no_gradient(groups):
    padding = torch.ones(ROW_TOKENS, dtype=torch.bool)
    for b0, _, _, b3 in groups:
        padding[b0:b3] = False
    row = make_row(groups, ROW_TOKENS, "cuda")
    for result in results(
        make_attention(None), row, make_inputs(torch.float32), "cuda", torch.float32
    ):
        assert (result[padding] == 0).all()
        assert result.isfinite().all()


def test_one_block_mask_per_row_and_window():
    row, tensors = make_row(PAIRS, ROW_TOKENS, "cuda"), make_inputs(torch.bfloat16)
    for window in (None, 100, None, 100):
        results(make_attention(window), row, tensors, "cuda", torch.bfloat16)
    assert len(row.derived) == 2


def test_rows_of_one_length_share_a_compilation():
    tensors, attention = make_inputs(torch.bfloat16), make_attention(None)
    results(attention, make_row(PAIRS, ROW_TOKENS, "cuda"), tensors, "cuda", torch.bfloat16)
    with torch.compiler.set_stance("fail_on_recompile"):
        results(attention, make_row(PLAIN, ROW_TOKENS, "cuda"), tensors, "cuda", torch.bfloat16)


def test_memory_is_not_quadratic_in_the_row_length():
    tokens = 16384
    spans = torch.tensor([[0, tokens // 2, 3 * tokens // 4, tokens]], dtype=torch.int32)
    answer = torch.arange(tokens // 2, 3 * tokens // 4)
    positions = torch.cat([torch.arange(tokens // 2), answer, answer]).cuda()
    query = torch.randn(tokens, 1, 2, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(tokens, 1, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    row = RowParams.of(positions, spans)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flex.attend_row_flex(query, key, key, row=row, scale=0.125, window=None)
    assert torch.cuda.max_memory_allocated() - before < tokens * tokens / 4  # bytes
