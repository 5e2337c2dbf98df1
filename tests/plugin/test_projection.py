import torch

from megatron_idpo.plugin.projection import Projection, read_shard
from megatron_idpo.plugin.tiles import TileSizes
from megatron_idpo.plugin.vocab_softmax import LogitTransform


def projection(num_rows, start=0):
    return Projection(
        start=start,
        num_rows=num_rows,
        transform=LogitTransform(),
        tiles=TileSizes(tokens=2, vocab=3),
        group=None,
        reduce_hidden_grad=True,
    )


def test_a_shard_is_read_in_tiles_without_its_padding():
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(5, 4).double(), torch.randn(8, 4).double()
    targets_N = torch.tensor([10, 16, 3, 12, 17])  # this rank has 10 to 16; row 7 is padding
    sum_NH = torch.zeros_like(hidden_NH)
    statistics = read_shard(hidden_NH, weight_VH, targets_N, projection(7, start=10), sum_NH)

    logits_NV = (hidden_NH @ weight_VH.t())[:, :7]
    own = {0: 0, 1: 6, 3: 2}
    expected_N = torch.full((5,), -torch.inf).double()
    for n, v in own.items():
        expected_N[n] = logits_NV[n, v]
        logits_NV[n, v] = -torch.inf
    torch.testing.assert_close(statistics.target_N, expected_N)
    torch.testing.assert_close(statistics.maximum_N, logits_NV.amax(1))
    terms_NV = (logits_NV - logits_NV.amax(1, keepdim=True)).exp()
    torch.testing.assert_close(statistics.sum_N, terms_NV.sum(1))
    torch.testing.assert_close(sum_NH, terms_NV @ weight_VH[:7])


def test_a_rank_of_padding_alone_knows_nothing():
    statistics = read_shard(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]), projection(0))
    assert statistics.sum_N.tolist() == [0.0, 0.0]
    assert statistics.target_N.tolist() == [-torch.inf, -torch.inf]
