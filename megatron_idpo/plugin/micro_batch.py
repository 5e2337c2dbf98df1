"""One micro-batch of preference pairs, as it travels through a pipeline.

A `MicroBatch` is the `packed_seq_params` of its forward pass. megatron-core closes over this object
per micro-batch and hands it to the layers of every stage, so attention, rotary embedding, taps and
heads all see the micro-batch they belong to, however the schedule interleaves and recomputes.

    T  row positions   N  targets   P  pairs; 2P sequences: 2p is pair p's chosen answer,
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
    """The response tokens of a row, which the heads score."""

    positions_N: Tensor
    """int64: the row position whose hidden state predicts the token."""

    tokens_N: Tensor
    """int64: the token."""

    sequences_N: Tensor
    """int64: the sequence it belongs to, in `[0, 2P)`."""

    num_pairs: int
    """P; 0 in an empty row."""

    def sum_by_sequence(self, values_N: Tensor) -> Tensor:
        """Sum a value per target over each sequence: `[2P]`, connected to the graph at N = 0.

        An empty row must stay connected: otherwise backward would skip its collectives and other
        ranks would wait in theirs.
        """
        sums_2P = values_N.new_zeros(2 * self.num_pairs)
        return sums_2P.index_add(0, self.sequences_N, values_N)

    def lengths(self) -> Tensor:
        """Response tokens of each sequence, float32 `[2P]`."""
        ones_N = torch.ones_like(self.tokens_N, dtype=torch.float32)
        return self.sum_by_sequence(ones_N)

    def validate(self, row_tokens: int) -> list[str]:
        """Everything that is inconsistent about targets of a row of `row_tokens` positions.

        Values are checked on a CPU only. On a GPU that would synchronize; there an index out of
        range is a device error.
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
            ("positions_N", self.positions_N, row_tokens, "positions in the row"),
            ("sequences_N", self.sequences_N, 2 * self.num_pairs, "sequences, two per pair"),
        )
        messages = [
            f"{name} has values from {int(values.min())} to {int(values.max())}, "
            f"but there are {limit} {unit}"
            for name, values, limit, unit in limits
            if values.min() < 0 or values.max() >= limit
        ]
        if not messages and len(self.sequences_N.unique()) < 2 * self.num_pairs:
            messages.append("a sequence has no target")
        return messages


@dataclass(kw_only=True, eq=False)
class MicroBatch(RowParams):
    """A row and what its losses need: targets and the reference's log-probabilities."""

    targets: Targets
    reference_logps: Mapping[int, Tensor] = field(default_factory=dict)
    """Sequence log-probabilities of the reference by layer (including the final one), float32
    `[2P]`. Empty if no losses are computed."""

    reference_free: bool = False
    """Losses without a reference: its log-probabilities count as 0."""

    index: int = 0
    """Index of this micro-batch in the step; outputs carry it."""

    num_micro_batches: int = 0
    """Micro-batches of this data-parallel rank in this step. Required in training."""

    global_pairs: int = 0
    """Pairs of the global batch, over all data-parallel ranks: the losses are averaged over them.
    Required in training."""

    def __post_init__(self) -> None:
        """Check what can be checked without synchronizing a GPU.

        Raises:
            DataError: targets or reference log-probabilities do not fit the row.
        """
        super().__post_init__()
        messages = [*self.targets.validate(self.row_tokens), *self._validate_reference()]
        if messages:
            location, remedy = f"micro-batch {self.index}", "build it from one row (data.packing)"
            raise DataError.of([Problem(location, message, remedy) for message in messages])

    def check_tokens(self, tokens_1T: Tensor, vocab_size: int) -> None:
        """Check the shape of this row's tokens, and its targets against the vocabulary.

        Raises:
            DataError: the tokens are of another row, or a target is not in the vocabulary.
        """
        location = f"micro-batch {self.index}"
        if tokens_1T.shape != (1, self.row_tokens):
            message = (
                f"tokens of shape {tuple(tokens_1T.shape)} for {self.row_tokens} row positions"
            )
            raise DataError.at(location, message, f"give int64 [1, {self.row_tokens}]")
        tokens_N = self.targets.tokens_N
        # On a GPU this would synchronize; there the loss of such a target is inf.
        if tokens_N.device.type == "cpu" and tokens_N.numel():
            least, most = int(tokens_N.min()), int(tokens_N.max())
            if least < 0 or most >= vocab_size:
                message = f"target tokens from {least} to {most} in a vocabulary of {vocab_size}"
                raise DataError.at(location, message, "use the tokenizer of this vocab_size")

    def _validate_reference(self) -> list[str]:
        if self.reference_free and self.reference_logps:
            return ["has reference_logps although it is reference_free"]
        num_sequences = 2 * self.targets.num_pairs
        messages = []
        for layer, logps_2P in self.reference_logps.items():
            if tuple(logps_2P.shape) != (num_sequences,):
                shape = tuple(logps_2P.shape)
                messages.append(
                    f"reference_logps[{layer}] has shape {shape}, not ({num_sequences},)"
                )
            # Sums over many tokens: 16 bits would round them to whole units.
            if logps_2P.dtype not in (torch.float32, torch.float64):
                messages.append(f"reference_logps[{layer}] is {logps_2P.dtype}, not float32")
        return messages
