import pytest
import torch

from megatron_idpo.plugin.tiles import (
    LogitsBuffer,
    TileSizes,
    accumulate,
    as_operand,
    native_bf16,
    product,
    slices,
)

FP32_SUMS = {"rtol": 1e-4, "atol": 1e-4}
"""64 products of unit normals in another order."""


def test_slices_cover_everything_once():
    assert list(slices(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(slices(6, 3)) == [slice(0, 3), slice(3, 6)]
    assert list(slices(2, 3)) == [slice(0, 2)]
    assert list(slices(0, 3)) == []


def test_a_tile_is_not_empty():
    with pytest.raises(AssertionError):
        TileSizes(tokens=0, vocab=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_of_narrow_operands_are_not_rounded(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(48, 64).to(dtype), torch.randn(64, 40).to(dtype)
    exact = a.double() @ b.double()
    out = torch.empty(48, 40, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with native_bf16(a):
        product(as_operand(a, dtype), as_operand(b, dtype), out)
        torch.testing.assert_close(out.double(), exact, **FP32_SUMS)
        accumulate(out, as_operand(a, dtype), as_operand(b, dtype))
    torch.testing.assert_close(out.double(), 2 * exact, **FP32_SUMS)


def test_the_setting_for_bf16_is_put_back_also_after_an_error():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(KeyError), native_bf16(torch.zeros(1, dtype=torch.bfloat16)):
        assert matmul.fp32_precision == "bf16"
        raise KeyError
    assert matmul.fp32_precision == before
    with native_bf16(torch.zeros(1)):
        assert matmul.fp32_precision == before


def test_one_piece_of_memory_serves_every_tile():
    buffer = LogitsBuffer(
        TileSizes(tokens=4, vocab=5), num_tokens=6, num_rows=8, like=torch.ones(1)
    )
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    full = buffer.product(hidden, weight)
    torch.testing.assert_close(full, hidden @ weight.t())
    last = buffer.product(hidden[:2], weight[:3])
    torch.testing.assert_close(last, hidden[:2] @ weight[:3].t())
    assert last.data_ptr() == full.data_ptr() and last.is_contiguous()
