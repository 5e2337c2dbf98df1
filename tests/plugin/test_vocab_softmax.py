"""Softmax over tiles equals the softmax of whole logits."""

import pytest
import torch

from megatron_idpo.plugin import vocab_softmax
from megatron_idpo.plugin.vocab_softmax import PartialSoftmax, combine_ranks, locate_columns

FP64 = {"rtol": 1e-12, "atol": 1e-12}


def statistics_of(logits_NV, targets_N, width):
    """Statistics after tiles of `width`, and the sum of their terms over the vocabulary."""
    num_tokens, everything = len(targets_N), slice(0, len(targets_N))
    statistics = PartialSoftmax.empty(num_tokens, logits_NV.dtype, logits_NV.device)
    terms_N = torch.zeros(num_tokens, dtype=logits_NV.dtype)
    for start in range(0, logits_NV.shape[1], width):
        tile_nv = logits_NV[:, start : start + width].clone()
        rescale_n = statistics.update(everything, tile_nv, targets_N - start)
        terms_N = terms_N * rescale_n + tile_nv.sum(1)
    return statistics, terms_N


def plain_logps(logits_NV, targets_N):
    return logits_NV.log_softmax(1).gather(1, targets_N[:, None])[:, 0]


@pytest.mark.parametrize("width", [1, 4, 11, 20])
def test_tiles_equal_the_softmax_of_whole_logits(width):
    torch.manual_seed(0)
    logits_NV = 10 * torch.randn(9, 11, dtype=torch.float64)
    targets_N = torch.randint(0, 11, (9,))
    statistics, terms_N = statistics_of(logits_NV, targets_N, width)
    softmax = combine_ranks(statistics, None)
    logps_N = plain_logps(logits_NV, targets_N)
    torch.testing.assert_close(softmax.logps(), logps_N, **FP64)
    torch.testing.assert_close(softmax.one_minus_p(), 1 - logps_N.exp(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms_N, statistics.sum_N, **FP64)


def test_logit_gradient_equals_autograd():
    torch.manual_seed(0)
    logits_NV = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    targets_N, grad_N = torch.randint(0, 7, (5,)), torch.randn(5, dtype=torch.float64)
    (plain_logps(logits_NV, targets_N) * grad_N).sum().backward()
    softmax = combine_ranks(statistics_of(logits_NV.detach(), targets_N, 3)[0], None)
    for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7))):
        tile_nv = logits_NV.detach()[rows, columns].clone()
        column_n = targets_N[rows] - columns.start
        softmax.to_logit_gradient(rows, tile_nv, column_n, grad_N[rows])
        torch.testing.assert_close(tile_nv, logits_NV.grad[rows, columns], **FP64)


def test_log_probability_keeps_its_digits_near_probability_one():
    """p = 1 - 1e-9 rounds to 1 in float32; log p and 1 - p keep float32 precision."""
    logits_NV = torch.tensor([[0.0, -20.7232658369464], [40.0, 40.0 - 20.7232658369464]])
    softmax = combine_ranks(statistics_of(logits_NV, torch.tensor([0, 0]), 1)[0], None)
    torch.testing.assert_close(softmax.one_minus_p(), torch.full((2,), 1e-9), rtol=1e-5, atol=0)
    torch.testing.assert_close(softmax.logps(), torch.full((2,), -1e-9), rtol=1e-5, atol=0)


def test_vocabulary_of_one_token():
    softmax = combine_ranks(statistics_of(torch.tensor([[3.0]]), torch.tensor([0]), 1)[0], None)
    assert softmax.logps().tolist() == [0.0] and softmax.one_minus_p().tolist() == [0.0]


def test_target_outside_every_shard_has_log_probability_minus_inf():
    softmax = combine_ranks(statistics_of(torch.randn(1, 4), torch.tensor([9]), 2)[0], None)
    assert softmax.logps().tolist() == [-torch.inf]


def test_extreme_logits_neither_overflow_nor_underflow():
    logits_NV = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    softmax = combine_ranks(statistics_of(logits_NV, torch.tensor([1, 2]), 1)[0], None)
    torch.testing.assert_close(softmax.logps(), torch.tensor([-2e4, -1.0986123]))


def test_locate_columns():
    inside, index = locate_columns(torch.tensor([-1, 0, 4, 5]), 5)
    assert inside.tolist() == [False, True, True, False]
    assert index[:, 0].tolist() == [0, 0, 4, 4]
    inside, index = locate_columns(torch.tensor([0, 1]), 0)
    assert inside.tolist() == [False, False] and index[:, 0].tolist() == [0, 0]


@pytest.mark.exhaustive
def test_compiled_functions_equal_eager_ones(monkeypatch):
    """A GPU runs the compiled functions; compiled for the CPU here, with several tile shapes."""
    torch.manual_seed(0)
    logits_NV, targets_N = torch.randn(20, 37), torch.randint(0, 37, (20,))
    grad_N = torch.randn(20)
    plain, terms_N = statistics_of(logits_NV, targets_N, 16)
    plain_nv = logits_NV.clone()
    arguments = (slice(0, 20), plain_nv, targets_N, grad_N)
    combine_ranks(plain, None).to_logit_gradient(*arguments)
    monkeypatch.setattr(
        vocab_softmax, "_for_device", lambda function, _: vocab_softmax._compiled(function)
    )
    compiled, compiled_terms_N = statistics_of(logits_NV, targets_N, 16)
    compiled_nv = logits_NV.clone()
    combine_ranks(compiled, None).to_logit_gradient(slice(0, 20), compiled_nv, *arguments[2:])
    torch.testing.assert_close(
        combine_ranks(compiled, None).logps(), combine_ranks(plain, None).logps()
    )
    torch.testing.assert_close(compiled_terms_N, terms_N)
    torch.testing.assert_close(compiled_nv, plain_nv)
