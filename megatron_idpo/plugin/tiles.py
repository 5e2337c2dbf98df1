"""The output projection of one rank, a tile of targets x vocabulary rows at a time.

Holds the tile sizes, matrix products with float32 results, and `scan_shard`, the pass that turns
hidden states into the softmax statistics of this rank's rows.

Logits rounded to bfloat16 are off by up to |z|/256, which changes a token's gradient by percents.
Every product here therefore returns its float32 accumulator
(`mcore/matmul.py`). Of operands, only the softmax terms are rounded.

    N  targets   V  this rank's vocabulary rows   H  hidden size   n, v  sizes of one tile
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.mcore.matmul import (
    accumulation_dtype,
    add_matmul,
    matmul,
    matmul_operand,
    onednn_bf16_matmul,
    slices,
)
from megatron_idpo.mcore.model.logit_map import LogitMap
from megatron_idpo.plugin.vocab_softmax import PartialSoftmax

_MIN_VOCAB = 2048
"""Vocabulary rows of a tile on a GPU with a small cache: products stay large enough."""


@dataclass(frozen=True, slots=True)
class TileSizes:
    """How much of the projection is in memory at a time. The result does not depend on it."""

    tokens: int
    """Targets per tile, at least 1."""

    vocab: int
    """Vocabulary rows per tile, at least 1. The float32 sum over the vocabulary, `[tokens, H]`, is
    read and written once per tile: few wide tiles keep that traffic small next to the products."""

    def __post_init__(self) -> None:
        """Assert that both sizes are positive."""
        assert self.tokens >= 1 and self.vocab >= 1, self

    @classmethod
    def default(cls, device: torch.device, *, frozen: bool) -> "TileSizes":
        """Sizes for a device, measured by `benchmarks/head.py`.

        A CPU tile stays in the last-level cache. A GPU tile is as many float32 logits as fit into
        the device's L2 cache (H100: 50 MB), with a power of two of vocabulary rows; fewer rows
        where the weight's gradient needs a float32 tile `[vocab, H]` as well.
        """
        if device.type == "cpu":
            return cls(tokens=512, vocab=2048)
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        return cls.for_cache(cache_bytes, frozen=frozen)

    @classmethod
    def for_cache(cls, cache_bytes: int, *, frozen: bool) -> "TileSizes":
        """Sizes for a GPU with a cache of so many bytes."""
        tokens = 1024 if frozen else 2048
        columns = max(cache_bytes // (4 * tokens), _MIN_VOCAB)  # float32
        vocab = 1 << (columns.bit_length() - 1)
        return cls(tokens, vocab)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How this rank turns hidden states into logits of its vocabulary rows."""

    start: int
    """Token id of the first row."""

    num_rows: int
    """Rows that are tokens. The rows after them are padding and are never multiplied."""

    tiles: TileSizes
    group: dist.ProcessGroup | None
    """The ranks that share the vocabulary; None: only this one."""

    reduce_hidden_grad: bool
    """Whether backward sums the hidden gradient over `group`."""

    logit_map: LogitMap = field(default_factory=LogitMap)
    """From products to logits."""

    def sum_over_ranks(self, grad_NH: Tensor) -> Tensor:
        """All-reduce over `group`, in place, unless the caller reduces. Used in backward.

        A rank's gradient covers its own vocabulary rows only; the sum covers all of them.
        """
        if self.reduce_hidden_grad and self.group is not None and self.group.size() > 1:
            dist.all_reduce(grad_NH, group=self.group)
        return grad_NH

    def vocab_tiles(self, weight_VH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """For each tile of token rows: which rows, and their weights `[v, H]` as an operand."""
        for rows in slices(self.num_rows, self.tiles.vocab):
            yield rows, matmul_operand(weight_VH[rows], weight_VH.dtype)

    def token_tiles(
        self, hidden_NH: Tensor, targets_N: Tensor, rows: slice
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each tile of targets: which, `[n, H]` as an operand, their columns in tile `rows`."""
        column_N = targets_N - (self.start + rows.start)
        for tokens in slices(targets_N.shape[0], self.tiles.tokens):
            hidden_nH = matmul_operand(hidden_NH[tokens], hidden_NH.dtype)
            yield tokens, hidden_nH, column_N[tokens]

    def buffer(self, hidden_NH: Tensor) -> Tensor:
        """Memory for the largest tile of logits, reused for every tile."""
        largest = min(self.tiles.tokens, len(hidden_NH)) * min(self.tiles.vocab, self.num_rows)
        return hidden_NH.new_empty(largest, dtype=accumulation_dtype(hidden_NH))


_PLAIN = LogitMap()


def tile_logits(
    hidden_nH: Tensor, weight_vH: Tensor, buffer: Tensor, logit_map: LogitMap = _PLAIN
) -> Tensor:
    """The logits `[n, v]`, in the memory of `buffer`; valid until the next call."""
    n, v = hidden_nH.shape[0], weight_vH.shape[0]
    logits_nv = buffer[: n * v].view(n, v)
    matmul(hidden_nH, weight_vH.t(), logits_nv)
    logit_map.apply_(logits_nv)
    return logits_nv


def scan_shard(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    projection: Projection,
    weighted_rows_NH: Tensor | None = None,
) -> PartialSoftmax:
    """This rank's softmax statistics of every target. 2·N·H·V FLOPs, no collective.

    Args:
        hidden_NH: hidden states.
        weight_VH: this rank's rows.
        targets_N: tokens of the whole vocabulary.
        projection: this rank's part of the vocabulary and the tile sizes.
        weighted_rows_NH: zeros of the accumulation dtype; on return Σ_{v≠y} exp(z_v − maximum) ·
            W[v] over this rank's rows, for another 2·N·H·V FLOPs; each W[v] multiplied by the
            derivative of a capped `logit_map` at z_v. None: not computed.
    """
    partial = PartialSoftmax.empty(
        targets_N.shape[0], accumulation_dtype(hidden_NH), hidden_NH.device
    )
    buffer = projection.buffer(hidden_NH)
    with onednn_bf16_matmul(hidden_NH):
        # Vocabulary in the outer loop: the weight, the larger operand, is read once.
        for rows, weight_vH in projection.vocab_tiles(weight_VH):
            for tokens, hidden_nH, column_n in projection.token_tiles(hidden_NH, targets_N, rows):
                logits_nv = tile_logits(hidden_nH, weight_vH, buffer, projection.logit_map)
                slope_nv = None
                if weighted_rows_NH is not None and projection.logit_map.cap is not None:
                    slope_nv = projection.logit_map.slope(logits_nv)
                # The buffer now holds exp(z − maximum) instead of logits, with 0 in the target's
                # column, so that the product below sums over v≠y without a mask.
                rescale_n = partial.update(tokens, logits_nv, column_n)
                if weighted_rows_NH is not None:
                    # Online softmax: sums of earlier tiles are relative to an older, smaller
                    # maximum. Rescaling them here means that no tile is multiplied twice.
                    weighted_rows_nH = weighted_rows_NH[tokens].mul_(rescale_n[:, None])
                    if slope_nv is not None:
                        logits_nv.mul_(slope_nv)
                    terms_nv = matmul_operand(logits_nv, weight_VH.dtype)
                    add_matmul(weighted_rows_nH, terms_nv, weight_vH)
    return partial
