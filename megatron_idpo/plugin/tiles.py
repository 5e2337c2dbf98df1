"""Tiles of the vocabulary projection, and the matrix products inside them.

What: how many targets and vocabulary rows are multiplied at a time, and products of 16-bit operands
with float32 results. Why: logits rounded to bfloat16 are off by up to |z|/256, which changes the
gradient of a token by percents; every product here keeps its float32 accumulator.

* On a GPU the product itself does it (`out_dtype`).
* On a CPU, PyTorch's bf16 product rounds its result and its fp16 product takes a hundred times as
  long, so tiles are widened to float32. For bf16, oneDNN is then allowed to multiply in bf16: that
  is exact, since what was widened is bf16, but for the softmax's terms, which a GPU rounds as well.

    n  targets in a tile   v  vocabulary rows in a tile   H  hidden size
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How much of the projection is in memory at a time; the result does not depend on it."""

    tokens: int
    """Targets per tile, at least 1."""

    vocab: int
    """Vocabulary rows per tile, at least 1. The float32 sum over the vocabulary, `[tokens, H]`, is
    read and written once per tile: few and wide tiles keep that small beside the products."""

    def __post_init__(self) -> None:
        """Sizes are counts."""
        assert self.tokens >= 1 and self.vocab >= 1, self

    @classmethod
    def default(cls, device: torch.device, *, frozen: bool) -> "TileSizes":
        """What suits a device; `benchmarks/head.py` measures it.

        A CPU's tile stays in its last-level cache. A GPU's fills it: 64 MiB of float32 logits, or
        32 MiB where the weight's gradient needs a float32 tile `[vocab, H]` beside them.
        """
        if device.type == "cpu":
            return cls(tokens=512, vocab=2048)
        return cls(tokens=1024, vocab=16384) if frozen else cls(tokens=2048, vocab=4096)


def slices(length: int, size: int) -> Iterator[slice]:
    """`0..length` in pieces of `size`; the last may be shorter, and there is none for length 0."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def accumulation_dtype(operand: Tensor) -> torch.dtype:
    """float64 for float64 (gradient checks), float32 for everything else."""
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def as_operand(values: Tensor, like: torch.dtype) -> Tensor:
    """`values` as products take them where the model's weights have dtype `like`.

    On a CPU 16-bit weights multiply as float32, elsewhere as they are.
    """
    is_widened = values.device.type == "cpu" and like.itemsize < 4
    return values.to(torch.float32 if is_widened else like)


def product(a_nk: Tensor, b_km: Tensor, out_nm: Tensor) -> None:
    """`out = a @ b` with operands from `as_operand`; `out` has the accumulation dtype."""
    if a_nk.dtype == out_nm.dtype:
        torch.mm(a_nk, b_km, out=out_nm)
    else:
        torch.mm(a_nk, b_km, out_dtype=out_nm.dtype, out=out_nm)


def accumulate(out_nm: Tensor, a_nk: Tensor, b_km: Tensor) -> None:
    """`out += a @ b` with operands from `as_operand`; `out` has the accumulation dtype."""
    if a_nk.dtype == out_nm.dtype:
        torch.addmm(out_nm, a_nk, b_km, out=out_nm)
    else:
        torch.addmm(out_nm, a_nk, b_km, out_dtype=out_nm.dtype, out=out_nm)


@contextmanager
def native_bf16(like: Tensor) -> Iterator[None]:
    """On a CPU, multiplies widened bf16 operands in bf16, accumulating in float32.

    It is oneDNN's setting for the whole process, so it is put back as it was.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        yield
        return
    # PyTorch makes this attribute at run time, out of the type checker's sight.
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class LogitsBuffer:
    """Memory for one tile of logits, used again for every tile."""

    def __init__(self, sizes: TileSizes, num_tokens: int, num_rows: int, like: Tensor) -> None:
        """Room for the largest tile that `num_tokens` targets and `num_rows` rows can need."""
        largest = min(sizes.tokens, num_tokens) * min(sizes.vocab, num_rows)
        self._memory = torch.empty(largest, dtype=accumulation_dtype(like), device=like.device)

    def product(self, hidden_nH: Tensor, weight_vH: Tensor) -> Tensor:
        """`hidden @ weight.T`, `[n, v]`, in this memory."""
        n, v = hidden_nH.shape[0], weight_vH.shape[0]
        logits_nv = self._memory[: n * v].view(n, v)
        product(hidden_nH, weight_vH.t(), logits_nv)
        return logits_nv
