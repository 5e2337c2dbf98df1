"""The GPU path's mask and blocks, through FlexAttention's plain implementation on the CPU.

It has no backward there: `test_attention_gpu.py` has the gradients. What attention has to be is
checked against a dense mask in `test_attention.py`; here SDPA on slices is the reference.
"""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from megatron_idpo.mcore.attention import flex as attention_flex
from megatron_idpo.mcore.attention.row_params import RowParams
from megatron_idpo.mcore.attention.sdpa import attend_row
from megatron_idpo.mcore.cpu import redirect as cpu

# Two fp32 kernels that sum in different orders, values of size 1.
FP32_TOLERANCE = dict(rtol=0, atol=2e-6)

MIXED = [(0, 5, 9, 16), (16, 19, 26, 28), (30, 37, 37, 37), (37, 41, 45, 45), (45, 46, 47, 50)]
PLAIN = [(0, 11, 11, 11), (11, 30, 30, 30), (33, 34, 34, 34)]


def make_row(groups, tokens):
    position_ids = torch.zeros(tokens, dtype=torch.int64)
    for b0, b1, b2, b3 in groups:
        position_ids[b0:b2] = torch.arange(b2 - b0)
        position_ids[b2:b3] = torch.arange(b1 - b0, b1 - b0 + b3 - b2)
    return RowParams.of(position_ids, torch.tensor(groups, dtype=torch.int32).reshape(-1, 4))


def make_inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, 1, heads, 16, generator=generator) for heads in (6, 2, 2)]


def visible_pairs(groups, tokens, window):
    """The definition, pair by pair."""
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for b0, b1, b2, b3 in groups:
        prompt = list(range(b0, b1))
        for sequence in ([*prompt, *range(b1, b2)], [*prompt, *range(b2, b3)]):
            for position, query in enumerate(sequence):
                seen = sequence[: position + 1]
                visible[query, seen if window is None else seen[-window:]] = True
    return visible


@pytest.fixture
def original_torch():
    """Without the redirection that another test may have left: the compiler does not know it."""
    redirected = cpu.is_redirected()
    cpu.restore_cuda()
    yield
    if redirected:
        cpu.redirect_cuda_to_cpu()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [MIXED, PLAIN], ids=["pairs", "plain"])
def test_equals_sdpa_on_slices_and_keeps_one_mask(groups, window):
    row, inputs = make_row(groups, 57), make_inputs(57)
    for _layer in range(2):
        actual = attention_flex.attend_row_flex(
            *inputs, row=row, scale=0.25, window=window, backend=None
        )
    assert len(row.derived) == 1
    expected = attend_row(*inputs, row=make_row(groups, 57), scale=0.25, window=window)
    torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler backend needs g++")
def test_rows_share_one_compilation(original_torch):
    """Compiled by another backend, but traced and guarded as on a GPU."""
    inputs = make_inputs(300)
    structures = [[(0, 60, 120, 160), (160, 190, 260, 280)], [(0, 99, 99, 99)]]
    for groups, stance in zip(structures, ("default", "fail_on_recompile"), strict=True):
        row = make_row(groups, 300)
        with torch.no_grad(), torch.compiler.set_stance(stance):
            actual = attention_flex.attend_row_flex(*inputs, row=row, scale=0.25, window=50)
        expected = attend_row(*inputs, row=row, scale=0.25, window=50)
        torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)


@pytest.mark.parametrize("num_lengths", [5, pytest.param(32, marks=pytest.mark.exhaustive)])
def test_every_length_and_window_is_compiled_once(original_torch, num_lengths):
    """More of them than the 8 compilations that dynamo grants one code object."""

    def attend_all(stance):
        for tokens in range(50, 50 + num_lengths):
            for window in (None, 4):
                row = make_row(MIXED, tokens)
                with torch.no_grad(), torch.compiler.set_stance(stance):
                    actual = attention_flex.attend_row_flex(
                        *make_inputs(tokens), row=row, scale=0.25, window=window, backend="eager"
                    )
                expected = attend_row(*make_inputs(tokens), row=row, scale=0.25, window=window)
                torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)

    attend_all("default")
    attend_all("fail_on_recompile")


@st.composite
def structures(draw):
    """Groups of any lengths with gaps between them, and padding behind."""
    groups, end = [], 0
    for _ in range(draw(st.integers(0, 4))):
        bounds = [end + draw(st.integers(0, 3))]
        for _ in range(3):
            bounds.append(bounds[-1] + draw(st.integers(0, 9)))
        groups.append(tuple(bounds))
        end = bounds[-1]
    return groups, end + draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(structures(), st.one_of(st.none(), st.integers(1, 12)))
def test_blocks_are_those_that_the_pairs_need(structure, window):
    groups, tokens = structure
    block = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "BLOCK", block)
        mask = attention_flex.block_mask(make_row(groups, tokens), window)
    visible = visible_pairs(groups, tokens, window)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    assert torch.equal(mask.mask_mod(None, None, query, key), visible)

    padded = torch.nn.functional.pad(visible, (0, -tokens % block, 0, -tokens % block))
    tiles = padded.unfold(0, block, block).unfold(1, block, block).flatten(2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(-1))
    full_blocks = torch.zeros_like(tiles[..., 0])
    for i, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        full_blocks[i, mask.full_kv_indices[0, 0, i, :count].long()] = True
    assert not (full_blocks & ~tiles.all(-1)).any()

    of_torch = create_block_mask(
        mask.mask_mod, 1, 1, tokens, tokens, device="cpu", BLOCK_SIZE=block
    )
    assert torch.equal(of_torch.to_dense(), mask.to_dense())


def test_most_of_a_long_rows_blocks_are_full_or_absent():
    groups = [(0, 1000, 1300, 1600), (1600, 2600, 2900, 4000)]
    mask = attention_flex.block_mask(make_row(groups, 4096), None)
    full, partial = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
    assert full / (full + partial) > 0.55
    assert (full + partial) / 32**2 < 0.3
