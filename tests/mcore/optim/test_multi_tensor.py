"""Norm and scaling of many tensors: equal to megatron-core's fallbacks, which they replace."""

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer

from megatron_idpo.mcore.optim import multi_tensor

NO_OVERFLOW = torch.zeros(1, dtype=torch.int)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (40, 7), (2, 2))]


def test_norm_equals_that_of_all_elements():
    ours, per_tensor = multi_tensor.l2_norm(0, NO_OVERFLOW, [tensors()], False)
    expected = torch.cat([tensor.flatten() for tensor in tensors()]).norm()
    assert ours.shape == (1,) and per_tensor is None
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_shows_a_bad_element(bad):
    values = tensors()
    values[2][1, 1] = bad
    assert not multi_tensor.l2_norm(0, NO_OVERFLOW, [values], False)[0].isfinite()


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scaling_equals_the_fallback_bitwise(factor):
    for dtype in (torch.float32, torch.bfloat16):
        ours = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors()]
        theirs = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors()]
        multi_tensor.scale(0, NO_OVERFLOW, [tensors(), ours], factor)
        utils.local_multi_tensor_scale(0, NO_OVERFLOW, [tensors(), theirs], factor)
        assert all(map(torch.equal, ours, theirs))


def test_scaling_in_place():
    values = tensors()
    multi_tensor.scale(0, NO_OVERFLOW, [values, values], 0.5)
    assert all(torch.equal(a, 0.5 * b) for a, b in zip(values, tensors(), strict=True))


def test_fused_kernels_are_kept(monkeypatch):
    fused = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", fused)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    monkeypatch.setattr(optimizer, "multi_tensor_scale_impl", fused)
    multi_tensor.use_foreach_operators()
    assert clip_grads.l2_norm_impl is fused and optimizer.multi_tensor_scale_impl is fused
    assert clip_grads.multi_tensor_scale_impl is multi_tensor.scale
