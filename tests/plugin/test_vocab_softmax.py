import pytest
import torch

from megatron_idpo.plugin import vocab_softmax
from megatron_idpo.plugin.vocab_softmax import LogitTransform, Statistics, combine, locate

FP64 = {"rtol": 1e-12, "atol": 1e-12}
TRANSFORMS = [LogitTransform(), LogitTransform(0.7), LogitTransform(0.7, 5.0)]


def folded(logits_NV, targets_N, width, transform=TRANSFORMS[0]):
    """Statistics after tiles of `width`, and the sum of their terms over the vocabulary."""
    num_tokens, everything = len(targets_N), slice(0, len(targets_N))
    statistics = Statistics.start(num_tokens, logits_NV.dtype, logits_NV.device)
    terms_N = torch.zeros(num_tokens, dtype=logits_NV.dtype)
    for start in range(0, logits_NV.shape[1], width):
        tile_nv = logits_NV[:, start : start + width].clone()
        rescale_n = statistics.fold(everything, tile_nv, targets_N - start, transform)
        terms_N = terms_N * rescale_n + tile_nv.sum(1)
    return statistics, terms_N


def plain_logps(logits_NV, targets_N, transform):
    z_NV = transform.scale * logits_NV
    if transform.softcap is not None:
        z_NV = transform.softcap * torch.tanh(z_NV / transform.softcap)
    return z_NV.log_softmax(1).gather(1, targets_N[:, None])[:, 0]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("width", [1, 4, 11, 20])
def test_tiles_give_the_whole_softmax(transform, width):
    torch.manual_seed(0)
    logits_NV = 10 * torch.randn(9, 11, dtype=torch.float64)
    targets_N = torch.randint(0, 11, (9,))
    statistics, terms_N = folded(logits_NV, targets_N, width, transform)
    softmax = combine(statistics, None)
    logps_N = plain_logps(logits_NV, targets_N, transform)
    torch.testing.assert_close(softmax.logps(), logps_N, **FP64)
    torch.testing.assert_close(softmax.miss(), 1 - logps_N.exp(), rtol=1e-9, atol=1e-12)
    if transform.softcap is None:
        torch.testing.assert_close(terms_N, statistics.sum_N, **FP64)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_gradient_at_the_logits_is_autograds(transform):
    torch.manual_seed(0)
    logits_NV = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    targets_N, grad_N = torch.randint(0, 7, (5,)), torch.randn(5, dtype=torch.float64)
    (plain_logps(logits_NV, targets_N, transform) * grad_N).sum().backward()
    softmax = combine(folded(logits_NV.detach(), targets_N, 3, transform)[0], None)
    for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7))):
        tile_nv = logits_NV.detach()[rows, columns].clone()
        column_n = targets_N[rows] - columns.start
        softmax.to_logit_gradient(rows, tile_nv, column_n, grad_N[rows], transform)
        torch.testing.assert_close(tile_nv, logits_NV.grad[rows, columns], **FP64)


def test_digits_of_what_a_sure_model_leaves():
    """p = 1 - 1e-9 is 1 in float32, yet its logarithm and 1 - p are right to float32's digits."""
    logits_NV = torch.tensor([[0.0, -20.7232658369464], [40.0, 40.0 - 20.7232658369464]])
    softmax = combine(folded(logits_NV, torch.tensor([0, 0]), 1)[0], None)
    torch.testing.assert_close(softmax.miss(), torch.full((2,), 1e-9), rtol=1e-5, atol=0)
    torch.testing.assert_close(softmax.logps(), torch.full((2,), -1e-9), rtol=1e-5, atol=0)


def test_a_vocabulary_of_one():
    softmax = combine(folded(torch.tensor([[3.0]]), torch.tensor([0]), 1)[0], None)
    assert softmax.logps().tolist() == [0.0] and softmax.miss().tolist() == [0.0]


def test_a_target_that_nobody_owns_is_impossible():
    softmax = combine(folded(torch.randn(1, 4), torch.tensor([9]), 2)[0], None)
    assert softmax.logps().tolist() == [-torch.inf]


def test_extreme_logits_neither_overflow_nor_vanish():
    logits_NV = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    softmax = combine(folded(logits_NV, torch.tensor([1, 2]), 1)[0], None)
    torch.testing.assert_close(softmax.logps(), torch.tensor([-2e4, -1.0986123]))


def test_locate():
    inside, index = locate(torch.tensor([-1, 0, 4, 5]), 5)
    assert inside.tolist() == [False, True, True, False]
    assert index[:, 0].tolist() == [0, 0, 4, 4]
    inside, index = locate(torch.tensor([0, 1]), 0)
    assert inside.tolist() == [False, False] and index[:, 0].tolist() == [0, 0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_compiled_functions_equal_the_plain_ones(transform, monkeypatch):
    """What a GPU runs, compiled for the CPU here; different tile shapes, as in the last tiles."""
    torch.manual_seed(0)
    logits_NV, targets_N = torch.randn(20, 37), torch.randint(0, 37, (20,))
    grad_N = torch.randn(20)
    plain, terms_N = folded(logits_NV, targets_N, 16, transform)
    plain_nv = logits_NV.clone()
    arguments = (slice(0, 20), plain_nv, targets_N, grad_N, transform)
    combine(plain, None).to_logit_gradient(*arguments)
    monkeypatch.setattr(
        vocab_softmax, "_for_device", lambda function, _: vocab_softmax._compiled(function)
    )
    compiled, compiled_terms_N = folded(logits_NV, targets_N, 16, transform)
    compiled_nv = logits_NV.clone()
    combine(compiled, None).to_logit_gradient(slice(0, 20), compiled_nv, *arguments[2:])
    torch.testing.assert_close(combine(compiled, None).logps(), combine(plain, None).logps())
    torch.testing.assert_close(compiled_terms_N, terms_N)
    torch.testing.assert_close(compiled_nv, plain_nv)
