"""One rank's share of the output projection: reading its rows of the vocabulary, tile by tile.

What both ways of `logprobs.py` have in common: which rows are tokens, how the family transforms its
logits, who shares the vocabulary, and the pass that turns hidden states into statistics.

    N  targets   V  this rank's rows   H  hidden size   n, v  of a tile
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_idpo.plugin.tiles import (
    LogitsBuffer,
    TileSizes,
    accumulate,
    accumulation_dtype,
    as_operand,
    native_bf16,
    slices,
)
from megatron_idpo.plugin.vocab_softmax import LogitTransform, Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How hidden states become logits on this rank."""

    start: int
    """The token that the first row is."""

    num_rows: int
    """Rows that are tokens; what follows is padding and is never multiplied."""

    transform: LogitTransform
    tiles: TileSizes
    group: dist.ProcessGroup | None
    """The ranks that share the vocabulary; None: only this one."""

    reduce_hidden_grad: bool
    """Whether backward sums the hidden gradient over `group`."""

    def sum_over_ranks(self, grad_NH: Tensor) -> Tensor:
        """An all-reduce over `group`, in place, unless the caller reduces. For use in backward."""
        if self.reduce_hidden_grad and self.group is not None and self.group.size() > 1:
            dist.all_reduce(grad_NH, group=self.group)
        return grad_NH

    def vocab_tiles(self, weight_VH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows that are tokens: which, and `[v, H]` as an operand."""
        for rows in slices(self.num_rows, self.tiles.vocab):
            yield rows, as_operand(weight_VH[rows], weight_VH.dtype)

    def token_tiles(
        self, hidden_NH: Tensor, targets_N: Tensor, rows: slice
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The targets: which, `[n, H]` as an operand, and their columns in the tile `rows`."""
        for tokens in slices(targets_N.shape[0], self.tiles.tokens):
            hidden_nH = as_operand(hidden_NH[tokens], hidden_NH.dtype)
            yield tokens, hidden_nH, targets_N[tokens] - (self.start + rows.start)

    def buffer(self, hidden_NH: Tensor) -> LogitsBuffer:
        """Room for the largest tile of logits."""
        return LogitsBuffer(self.tiles, hidden_NH.shape[0], self.num_rows, hidden_NH)


def read_shard(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    projection: Projection,
    sum_NH: Tensor | None = None,
) -> Statistics:
    """This rank's statistics of every target, 2·N·H·V FLOPs, and its weighted sum of rows.

    When a tile raises a maximum the sum over earlier tiles is rescaled (an online softmax), so that
    no tile is multiplied twice. Vocabulary outside, targets inside: the weight is read once.

    Args:
        hidden_NH: hidden states.
        weight_VH: this rank's rows.
        targets_N: tokens of the whole vocabulary.
        projection: how to read them.
        sum_NH: zeros of the accumulation dtype; on return Σ_{v≠y} exp(z_v − maximum) · slope_v ·
            W[v], for another 2·N·H·V. None: not wanted.
    """
    statistics = Statistics.start(
        targets_N.shape[0], accumulation_dtype(hidden_NH), hidden_NH.device
    )
    buffer = projection.buffer(hidden_NH)
    with native_bf16(hidden_NH):
        for rows, weight_vH in projection.vocab_tiles(weight_VH):
            for tokens, hidden_nH, column_n in projection.token_tiles(hidden_NH, targets_N, rows):
                logits_nv = buffer.product(hidden_nH, weight_vH)
                rescale_n = statistics.fold(tokens, logits_nv, column_n, projection.transform)
                if sum_NH is not None:
                    sum_nH = sum_NH[tokens].mul_(rescale_n[:, None])
                    accumulate(sum_nH, as_operand(logits_nv, weight_VH.dtype), weight_vH)
    return statistics
