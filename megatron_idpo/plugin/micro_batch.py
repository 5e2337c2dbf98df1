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

from megatron_idpo.errors import DataError, Problem
from megatron_idpo.mcore.attention.row_params import RowParams


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

    def mistakes(self, row_tokens: int) -> list[str]:
        """What cannot be true of targets in a row of so many positions.

        Values are looked at on a CPU only; on a GPU that would synchronise, and there an index
        outside its range is an error of the device.
        """
        tensors = (self.positions_N, self.tokens_N, self.sequences_N)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            return [f"positions, tokens and sequences have shapes {shapes}, not one [N]"]
        if {tensor.dtype for tensor in tensors} != {torch.int64}:
            return ["positions, tokens and sequences are not all int64"]
        if self.num_pairs < 0 or (self.num_pairs == 0) != (shapes[0] == (0,)):
            return [f"{shapes[0][0]} targets for {self.num_pairs} pairs"]
        if self.num_pairs == 0 or self.positions_N.device.type != "cpu":
            return []
        limits = (
            ("positions_N", self.positions_N, row_tokens, "positions of the row"),
            ("sequences_N", self.sequences_N, 2 * self.num_pairs, "sequences, two for each pair"),
        )
        found = [
            f"{name} reaches from {int(values.min())} to {int(values.max())}, "
            f"but there are {limit} {what}"
            for name, values, limit, what in limits
            if values.min() < 0 or values.max() >= limit
        ]
        if not found and len(self.sequences_N.unique()) < 2 * self.num_pairs:
            found.append("a sequence has no target")
        return found


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

    num_micro_batches: int = 0
    """Of this data-parallel rank in this step. Training has to say it."""

    global_pairs: int = 0
    """Pairs in the whole global batch, over all data-parallel ranks: what losses average over.
    Training has to say it."""

    def __post_init__(self) -> None:
        """Check what costs nothing to check.

        Raises:
            DataError: targets or reference log-probabilities that cannot be this row's.
        """
        super().__post_init__()
        mistakes = [*self.targets.mistakes(self.row_tokens), *self._reference_mistakes()]
        if mistakes:
            location, remedy = f"micro-batch {self.index}", "build it from one row (data/rows.py)"
            raise DataError.of([Problem(location, mistake, remedy) for mistake in mistakes])

    def check_tokens(self, tokens_1T: Tensor, vocab_size: int) -> None:
        """Check this row's tokens, and its targets against the vocabulary.

        Raises:
            DataError: they are another row's, or there are no such tokens.
        """
        location = f"micro-batch {self.index}"
        if tokens_1T.shape != (1, self.row_tokens):
            message = (
                f"tokens of shape {tuple(tokens_1T.shape)} for {self.row_tokens} row positions"
            )
            raise DataError.at(location, message, f"give int64 [1, {self.row_tokens}]")
        tokens_N = self.targets.tokens_N
        # On a GPU this would synchronise; there such a target's loss is infinite.
        if tokens_N.device.type == "cpu" and tokens_N.numel():
            least, most = int(tokens_N.min()), int(tokens_N.max())
            if least < 0 or most >= vocab_size:
                message = f"targets reach from {least} to {most} in a vocabulary of {vocab_size}"
                raise DataError.at(
                    location, message, "use the tokenizer that vocab_size belongs to"
                )

    def _reference_mistakes(self) -> list[str]:
        if self.reference_free and self.reference_logps:
            return ["is reference_free and brings reference_logps"]
        sequences = 2 * self.targets.num_pairs
        found = []
        for layer, logps_2P in self.reference_logps.items():
            if tuple(logps_2P.shape) != (sequences,):
                shape = tuple(logps_2P.shape)
                found.append(f"reference_logps[{layer}] has shape {shape}, not ({sequences},)")
            # Sums of many logarithms: 16 bits would round them by whole units.
            if logps_2P.dtype not in (torch.float32, torch.float64):
                found.append(f"reference_logps[{layer}] is {logps_2P.dtype}, not float32")
        return found
