"""The GPU backend's mask and blocks, with uncompiled FlexAttention on a CPU.

That has no backward pass: gradients are tested in `test_gpu.py`. The reference here is SDPA on
slices, which `test_row_attention.py` compares with a dense mask.
"""

import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron_idpo.mcore.attention import flex
from megatron_idpo.mcore.attention.capped import attend_row_capped
from megatron_idpo.mcore.attention.sdpa import attend_row
from megatron_idpo.mcore.cpu import redirect

from .rows import MIXED, PLAIN, ROW_TOKENS, dealt_rows, make_row, row_structures, visible_pairs

# Two fp32 kernels that sum in different orders; values are of size 1.
FP32_TOLERANCE = dict(rtol=0, atol=2e-6)


def make_inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, 1, heads, 16, generator=generator) for heads in (6, 2, 2)]


@pytest.fixture
def original_torch():
    """Removes the CPU redirection that another test may have installed: dynamo cannot trace it."""
    redirected = redirect.is_redirected()
    redirect.restore_cuda()
    yield
    if redirected:
        redirect.redirect_cuda_to_cpu()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [MIXED, PLAIN], ids=["pairs", "plain"])
def test_matches_sdpa_and_builds_one_mask_per_row(groups, window):
    row, inputs = make_row(groups, ROW_TOKENS), make_inputs(ROW_TOKENS)
    for _layer in range(2):
        actual = flex.attend_row_flex(*inputs, row=row, scale=0.25, window=window, backend=None)
    assert len(row.derived) == 1
    expected = attend_row(*inputs, row=make_row(groups, ROW_TOKENS), scale=0.25, window=window)
    torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)


@pytest.mark.parametrize("window", [None, 3])
def test_capped_scores_match_the_cpu_backend(window):
    row, inputs = make_row(MIXED, ROW_TOKENS), make_inputs(ROW_TOKENS)
    settings = {"scale": 1.0, "window": window, "cap": 1.5}
    actual = flex.attend_row_flex(*inputs, row=row, **settings, backend=None)
    expected = attend_row_capped(*inputs, row=row, **settings)
    torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)
    uncapped = attend_row(*inputs, row=row, scale=1.0, window=window)
    assert (expected - uncapped).abs().max() > 0.1


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dealt_rows_match_sdpa(window, ranks):
    rows = dealt_rows(MIXED, ROW_TOKENS, ranks)
    query, key, value = make_inputs(rows[0].row_tokens)
    for row in rows:
        inputs = (query[torch.from_numpy(row.share.own_L)], key, value)
        expected = attend_row(*inputs, row=row, scale=0.25, window=window)
        actual = flex.attend_row_flex(*inputs, row=row, scale=0.25, window=window, backend=None)
        torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)
        settings = {"scale": 1.0, "window": window, "cap": 1.5}
        actual = flex.attend_row_flex(*inputs, row=row, **settings, backend=None)
        expected = attend_row_capped(*inputs, row=row, **settings)
        torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler backend needs g++")
def test_rows_share_one_compilation(original_torch):
    """On a CPU, but traced and guarded as on a GPU."""
    inputs = make_inputs(300)
    structures = [[(0, 60, 120, 160), (160, 190, 260, 280)], [(0, 99, 99, 99)]]
    for groups, stance in zip(structures, ("default", "fail_on_recompile"), strict=True):
        row = make_row(groups, 300)
        with torch.no_grad(), torch.compiler.set_stance(stance):
            actual = flex.attend_row_flex(*inputs, row=row, scale=0.25, window=50)
        expected = attend_row(*inputs, row=row, scale=0.25, window=50)
        torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)


@pytest.mark.parametrize("num_lengths", [5, pytest.param(32, marks=pytest.mark.exhaustive)])
def test_each_length_and_window_compiles_once(original_torch, num_lengths):
    """Together they exceed the 8 compilations that dynamo allows per code object."""

    def attend_all(stance):
        for tokens in range(50, 50 + num_lengths):
            for window in (None, 4):
                row = make_row(MIXED, tokens)
                with torch.no_grad(), torch.compiler.set_stance(stance):
                    actual = flex.attend_row_flex(
                        *make_inputs(tokens), row=row, scale=0.25, window=window, backend="eager"
                    )
                expected = attend_row(*make_inputs(tokens), row=row, scale=0.25, window=window)
                torch.testing.assert_close(actual, expected, **FP32_TOLERANCE)

    attend_all("default")
    attend_all("fail_on_recompile")


@settings(max_examples=40, deadline=None)
@given(row_structures(), st.one_of(st.none(), st.integers(1, 12)))
def test_blocks_match_the_visible_pairs(structure, window):
    groups, tokens = structure
    block = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", block)
        mask = flex.block_mask(make_row(groups, tokens), window)
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

    expected = create_block_mask(
        mask.mask_mod, 1, 1, tokens, tokens, device="cpu", BLOCK_SIZE=block
    )
    assert torch.equal(expected.to_dense(), mask.to_dense())


@settings(max_examples=40, deadline=None)
@given(row_structures(), st.one_of(st.none(), st.integers(1, 12)), st.sampled_from([2, 3]))
@example(([(0, 1, 1, 8), (8, 8, 8, 8), (8, 8, 8, 16)], 17), None, 2)
def test_blocks_of_a_dealt_row_match_the_visible_pairs(structure, window, ranks):
    groups, tokens = structure
    block = 4
    for row in dealt_rows(groups, tokens, ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "BLOCK", block)
            mask = flex.block_mask(row, window)
        visible = visible_pairs(groups, row.row_tokens, window)[torch.from_numpy(row.share.own_L)]
        query = torch.arange(row.own_tokens)[:, None]
        key = torch.arange(row.row_tokens)[None, :]
        assert torch.equal(mask.mask_mod(None, None, query, key), visible)
        expected = create_block_mask(
            mask.mask_mod, 1, 1, *visible.shape, device="cpu", BLOCK_SIZE=block
        )
        assert torch.equal(expected.to_dense(), mask.to_dense())
        # In full blocks the mask function is not called. FlexAttention derives the same ones, and
        # more where an answer is empty: a block may then span a prompt and the answer after it.
        assert (mask.full_kv_num_blocks <= expected.full_kv_num_blocks).all()
        if all(begin < middle < end for _, begin, middle, end in groups):
            assert torch.equal(expected.full_kv_num_blocks, mask.full_kv_num_blocks)


def test_blocks_are_also_listed_by_key():
    """For the backward pass: what FlexAttention derives from the lists by query."""
    mask = flex.block_mask(make_row([(0, 300, 450, 700), (700, 800, 801, 950)], 1000), None)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    derived = BlockMask.from_kv_blocks(*(getattr(mask, name) for name in names))
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(mask, name), getattr(derived, name)), name


def test_most_blocks_of_a_long_row_are_full_or_skipped():
    groups = [(0, 1000, 1300, 1600), (1600, 2600, 2900, 4000)]
    mask = flex.block_mask(make_row(groups, 4096), None)
    full, partial = int(mask.full_kv_num_blocks.sum()), int(mask.kv_num_blocks.sum())
    assert full / (full + partial) > 0.55
    assert (full + partial) / 32**2 < 0.3
