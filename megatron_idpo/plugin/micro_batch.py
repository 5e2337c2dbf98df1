"""One micro-batch of preference pairs, as it travels through a pipeline.

A `MicroBatch` is the `packed_seq_params` of its forward pass: megatron-core closes over it per
micro-batch and hands it to every stage's layers, so attention, rotary embedding, taps and heads all
see the micro-batch they belong to, whatever the schedule interleaves and recomputes.

    T  row positions   N  targets   P  pairs; sequences count 2P: 2p is pair p's chosen answer,
    2p + 1 its rejected one
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_idpo.mcore.row_params import RowParams


@dataclass(frozen=True, slots=True)
class Targets:
    """The response tokens of a row: all that the heads are asked about."""

    positions_N: Tensor
    """int64: the row position whose hidden state predicts the token."""

    tokens_N: Tensor
    """int64: the token."""

    sequences_N: Tensor
    """int64: which of the row's 2P sequences it belongs to."""

    num_pairs: int
    """P; 0 in an empty row."""

    def sum_by_sequence(self, values_N: Tensor) -> Tensor:
        """Add up a value per target over each sequence: `[2P]`, connected to the graph at N = 0."""
        sums_2P = values_N.new_zeros(2 * self.num_pairs)
        return sums_2P.index_add(0, self.sequences_N, values_N)

    def lengths(self) -> Tensor:
        """Response tokens of each sequence, float32 `[2P]`."""
        ones_N = torch.ones_like(self.tokens_N, dtype=torch.float32)
        return self.sum_by_sequence(ones_N)


@dataclass(kw_only=True, eq=False)
class MicroBatch(RowParams):
    """A row with what its losses need: targets and the reference's log-probabilities."""

    targets: Targets
    reference_logps: Mapping[int, Tensor] = field(default_factory=dict)
    """Sequence log-probabilities of the reference by layer (the final one too), float32 `[2P]`.
    Empty where only scores are wanted."""

    reference_free: bool = False
    """Losses without a reference: its log-ratios count as 0."""

    index: int = 0
    """Which micro-batch of the step this is; outputs carry it."""

    num_micro_batches: int = 1
    """Of this data-parallel rank in this step."""

    global_pairs: int = 1
    """Pairs in the whole global batch, over all data-parallel ranks: what losses average over."""
