"""Tiles, and the scan of one vocabulary shard."""

import pytest
import torch

from megatron_idpo.plugin.tiles import Projection, TileSizes, scan_shard, tile_logits


def test_empty_tile_is_rejected():
    with pytest.raises(AssertionError):
        TileSizes(tokens=0, vocab=8)


@pytest.mark.parametrize("cache_mb", [6, 40, 50, 126])
def test_logits_of_a_gpu_tile_fit_into_its_cache(cache_mb):
    for frozen in (True, False):
        tiles = TileSizes.for_cache(cache_mb << 20, frozen=frozen)
        bytes_used = 4 * tiles.tokens * tiles.vocab
        assert bytes_used <= max(cache_mb, 16) << 20
        assert bytes_used > cache_mb << 18  # more than a quarter of it


def test_all_tiles_share_one_buffer():
    buffer = projection(num_rows=8).buffer(torch.ones(6, 3))
    assert buffer.shape == (2 * 3,) and buffer.dtype == torch.float32
    hidden, weight = torch.randn(2, 3), torch.randn(3, 3)
    full = tile_logits(hidden, weight, buffer)
    torch.testing.assert_close(full, hidden @ weight.t())
    last = tile_logits(hidden[:1], weight[:2], buffer)
    torch.testing.assert_close(last, hidden[:1] @ weight[:2].t())
    assert last.data_ptr() == full.data_ptr() and last.is_contiguous()


def projection(num_rows, start=0):
    return Projection(
        start=start,
        num_rows=num_rows,
        tiles=TileSizes(tokens=2, vocab=3),
        group=None,
        reduce_hidden_grad=True,
    )


def test_scan_in_tiles_skips_padding_rows_and_the_target_column():
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(5, 4).double(), torch.randn(8, 4).double()
    targets_N = torch.tensor([10, 16, 3, 12, 17])  # this rank has 10 to 16; row 7 is padding
    sum_NH = torch.zeros_like(hidden_NH)
    partial = scan_shard(hidden_NH, weight_VH, targets_N, projection(7, start=10), sum_NH)

    logits_NV = (hidden_NH @ weight_VH.t())[:, :7]
    column_of_target = {0: 0, 1: 6, 3: 2}
    expected_N = torch.full((5,), -torch.inf).double()
    for n, v in column_of_target.items():
        expected_N[n] = logits_NV[n, v]
        logits_NV[n, v] = -torch.inf
    torch.testing.assert_close(partial.target_N, expected_N)
    torch.testing.assert_close(partial.maximum_N, logits_NV.amax(1))
    terms_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).exp()
    torch.testing.assert_close(partial.sum_N, terms_NV.sum(1))
    torch.testing.assert_close(sum_NH, terms_NV @ weight_VH[:7])


def test_shard_of_padding_only_has_empty_statistics():
    partial = scan_shard(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]), projection(0))
    assert partial.sum_N.tolist() == [0.0, 0.0]
    assert partial.target_N.tolist() == [-torch.inf, -torch.inf]
