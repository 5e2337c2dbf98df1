"""Targets: the response tokens that the heads score, and where they are predicted.

A model's hidden states are `[S, B, H]`: S positions of B rows of a padded batch, or S positions of
one packed row. A target names a token, the position of the hidden state that predicts it (the one
before the token) and the sequence that it belongs to. Prompts and padding have no targets, so they
cost nothing in the vocabulary projection.

    S  positions   B  rows of the batch (1 if packed)   N  targets   Q  sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor

from megatron_idpo.errors import DataError


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Targets:
    """The response tokens of a micro-batch. All tensors are on one device.

    Build them with `from_mask`, `from_lengths` or `from_packed`, best on a CPU: on a GPU these wait
    for the device.
    """

    positions_N: Tensor
    """int64: index into the hidden states' first two dimensions, flattened: `s * B + b`."""

    tokens_N: Tensor
    """int64: the token."""

    sequences_N: Tensor
    """int64: the sequence it belongs to, in `[0, Q)`."""

    num_sequences: int
    """Q; 0 in a micro-batch without pairs."""

    shape: tuple[int, int]
    """(B, S) of the whole micro-batch's tokens, over all context-parallel ranks."""

    bounds: tuple[int, ...] | None = None
    """Where packed sequences begin, and the end of the last one. Context parallelism splits each of
    them; None: it splits all S positions together."""

    dealt: "Targets | None" = None
    """Under context parallelism, where a row's positions are dealt to the ranks instead of cut into
    runs: the targets of this rank, with positions in its hidden states."""

    token_positions_N: Tensor | None = None
    """int64: where the token itself is, indexed like `positions_N`. None: not known, so the model's
    input is not compared with the targets."""

    digest: int | None = None
    """`digest_of` these targets, if they were built on a CPU; kept by `to`."""

    @classmethod
    def from_mask(cls, tokens_BS: Tensor, response_mask_BS: Tensor) -> Self:
        """Targets of a padded batch; every row is a sequence.

        Args:
            tokens_BS: int64 `[B, S]`.
            response_mask_BS: bool `[B, S]`: which tokens are scored. Answers of several turns, and
                padding on either side, need nothing else.

        Raises:
            DataError: the shapes differ, a row begins with a response token, which no position
                predicts, or some rows have no response token. If none has one, the micro-batch is
                empty.
        """
        if tokens_BS.shape != response_mask_BS.shape or tokens_BS.dim() != 2:
            shapes = f"{tuple(tokens_BS.shape)} and {tuple(response_mask_BS.shape)}"
            message = f"tokens and response mask have shapes {shapes}, not one [B, S]"
            raise DataError.at("Targets.from_mask", message, "give both as [batch, sequence]")
        num_rows = tokens_BS.shape[0]
        sequence_N, position_N = response_mask_BS.bool().nonzero(as_tuple=True)
        _check_first("Targets.from_mask", sequence_N[position_N == 0])
        num_sequences = num_rows if len(sequence_N) else 0
        _check_complete("Targets.from_mask", sequence_N, num_sequences)
        return cls(
            # The token at s is predicted at s - 1.
            positions_N=(position_N - 1) * num_rows + sequence_N,
            tokens_N=tokens_BS[sequence_N, position_N].to(torch.int64),
            sequences_N=sequence_N,
            num_sequences=num_sequences,
            shape=(num_rows, tokens_BS.shape[1]),
            token_positions_N=position_N * num_rows + sequence_N,
        )._with_digest()

    @classmethod
    def from_lengths(
        cls, tokens_BS: Tensor, prompt_lengths: Sequence[int], lengths: Sequence[int]
    ) -> Self:
        """Targets of a right-padded batch of one prompt and one answer per row.

        Args:
            tokens_BS: int64 `[B, S]`.
            prompt_lengths: tokens of each row's prompt, at least 1.
            lengths: tokens of each row's prompt and answer.

        Raises:
            DataError: as for `from_mask`, or a length is larger than S.
        """
        num_rows, num_positions = tokens_BS.shape
        if not len(prompt_lengths) == len(lengths) == num_rows:
            message = f"{len(prompt_lengths)} and {len(lengths)} lengths for {num_rows} rows"
            raise DataError.at("Targets.from_lengths", message, "give one of each per row")
        if num_rows and max(lengths) > num_positions:
            message = f"a length of {max(lengths)} in rows of {num_positions} tokens"
            raise DataError.at("Targets.from_lengths", message, "truncate the lengths too")
        prompt_B, end_B = (
            torch.as_tensor(values, device=tokens_BS.device) for values in (prompt_lengths, lengths)
        )
        position_S = torch.arange(num_positions, device=tokens_BS.device)
        is_answer_BS = (position_S >= prompt_B[:, None]) & (position_S < end_B[:, None])
        return cls.from_mask(tokens_BS, is_answer_BS)

    @classmethod
    def from_packed(
        cls, tokens_1S: Tensor, cu_seqlens: Sequence[int] | Tensor, response_mask_1S: Tensor
    ) -> Self:
        """Targets of sequences packed one after another (Megatron's `thd` format).

        Args:
            tokens_1S: int64 `[1, S]` or `[S]`.
            cu_seqlens: where each sequence begins in `tokens_1S`, and the end of the last one;
                `cu_seqlens_q_padded` where there is padding between sequences. Sequences at the end
                without response tokens are padding.
            response_mask_1S: bool, of the shape of `tokens_1S`: which tokens are scored.

        Raises:
            DataError: the shapes do not fit, a sequence begins with a response token, one before
                the last response token has none, or a response token is in no sequence.
        """
        location = "Targets.from_packed"
        tokens_S, mask_S = tokens_1S.flatten(), response_mask_1S.flatten().bool()
        bounds = [int(bound) for bound in cu_seqlens]
        is_ascending = bounds == sorted(bounds) and bounds[:1] == [0]
        if tokens_S.shape != mask_S.shape or not is_ascending or bounds[-1] > len(tokens_S):
            message = f"{len(tokens_S)} tokens, {len(mask_S)} mask values and bounds {bounds}"
            remedy = "give tokens and mask of one length, and ascending bounds from 0 within it"
            raise DataError.at(location, message, remedy)
        (position_N,) = mask_S.nonzero(as_tuple=True)
        if len(position_N) and (last := int(position_N[-1])) >= bounds[-1]:
            message = f"a response token at {last}, but the last sequence ends at {bounds[-1]}"
            remedy = "mask padding, or give bounds that include every answer"
            raise DataError.at(location, message, remedy)
        starts = torch.tensor(bounds, device=tokens_S.device)
        sequence_N = torch.searchsorted(starts, position_N, right=True) - 1
        _check_first(location, sequence_N[position_N == starts[sequence_N]])
        num_sequences = int(sequence_N.max()) + 1 if len(sequence_N) else 0
        _check_complete(location, sequence_N, num_sequences)
        return cls(
            positions_N=position_N - 1,
            tokens_N=tokens_S[position_N].to(torch.int64),
            sequences_N=sequence_N,
            num_sequences=num_sequences,
            shape=(1, len(tokens_S)),
            bounds=tuple(bounds),
            token_positions_N=position_N,
        )._with_digest()

    def _with_digest(self) -> Self:
        if self.tokens_N.device.type != "cpu":
            return self  # reading it would wait for the device
        digest = digest_of(self.positions_N, self.tokens_N, self.sequences_N)
        return replace(self, digest=int(digest))

    def current_digest(self) -> int | Tensor:
        """`digest`, or its computation, `[]`, which does not wait for a GPU."""
        if self.digest is not None:
            return self.digest
        return digest_of(self.positions_N, self.tokens_N, self.sequences_N)

    def to(self, device: torch.device | str) -> Self:
        """These targets on another device."""
        names = ("positions_N", "tokens_N", "sequences_N", "token_positions_N")
        values: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in values.items()
        }
        if self.dealt is not None:
            moved["dealt"] = self.dealt.to(device)
        return replace(self, **moved)

    def on_context_rank(self, rank: int, size: int) -> Self:
        """The targets that a context-parallel rank predicts, with positions in its hidden states.

        megatron-core cuts a sequence into `2 * size` parts and gives rank r the parts r and
        `2 * size - 1 - r`, in this order: with a causal mask all ranks have equal work. A target
        belongs to the rank of the position that predicts it, so its token may be another rank's.
        Rows may be dealt otherwise (`dealt`).

        Raises:
            DataError: a sequence cannot be cut into equal parts.
        """
        if size == 1:
            return self
        if self.dealt is not None:
            return cast(Self, self.dealt)
        local_N, own_N = self._zigzag(self.positions_N, rank, size)
        return replace(
            self,
            positions_N=local_N[own_N],
            tokens_N=self.tokens_N[own_N],
            sequences_N=self.sequences_N[own_N],
            token_positions_N=None,
        )

    def count_mismatches(self, tokens_BS: Tensor, rank: int = 0, size: int = 1) -> Tensor | None:
        """How many targets differ from the model's input: int64 `[]`. Does not wait for a GPU.

        Args:
            tokens_BS: what a context-parallel rank calls the model with, on the targets' device.
            rank: of the context-parallel ranks.
            size: their number.

        Returns:
            None if the targets do not know where their tokens are.
        """
        if self.token_positions_N is None:
            return None
        index_N, is_own_N = self._zigzag(self.token_positions_N, rank, size)
        num_rows = self.shape[0]
        differs_N = tokens_BS[index_N % num_rows, index_N // num_rows] != self.tokens_N
        return (differs_N & is_own_N).sum()

    def _zigzag(self, index_N: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
        """Indices into a context-parallel rank's positions, and which of them it has.

        Raises:
            DataError: a sequence cannot be cut into equal parts.
        """
        if size == 1:
            return index_N, torch.ones_like(index_N, dtype=torch.bool)
        num_rows, num_positions = self.shape
        bounds = self.bounds or (0, num_positions)
        lengths = [end - start for start, end in pairwise(bounds)]
        if any(length % (2 * size) for length in lengths):
            message = f"sequences of {sorted(set(lengths))} positions on {size} context ranks"
            remedy = f"pad each to a multiple of {2 * size} positions"
            raise DataError.at("targets", message, remedy)
        starts = torch.tensor(bounds, device=index_N.device)
        position_N, row_N = index_N // num_rows, index_N % num_rows
        segment_N = torch.searchsorted(starts, position_N, right=True) - 1
        start_N = starts[segment_N]
        part_tokens_N = (starts[segment_N + 1] - start_N) // (2 * size)
        part_N = (position_N - start_N) // part_tokens_N
        offset_N = (position_N - start_N) % part_tokens_N
        # The rank's second part of a sequence comes after its first.
        offset_N = offset_N + torch.where(part_N == rank, 0, part_tokens_N)
        local_N = (start_N // size + offset_N) * num_rows + row_N
        return local_N, (part_N == rank) | (part_N == 2 * size - 1 - rank)

    def sum_by_sequence(self, values_N: Tensor) -> Tensor:
        """Sum a value per target over each sequence: `[Q]`, connected to the graph at N = 0.

        An empty micro-batch must stay connected: otherwise backward would skip its collectives and
        other ranks would wait in theirs.
        """
        sums_Q = values_N.new_zeros(self.num_sequences)
        return sums_Q.index_add(0, self.sequences_N, values_N)

    def lengths(self) -> Tensor:
        """Response tokens of each sequence, float32 `[Q]`."""
        ones_N = torch.ones_like(self.tokens_N, dtype=torch.float32)
        return self.sum_by_sequence(ones_N)

    def validate(self) -> list[str]:
        """Everything that is inconsistent.

        Values are checked on a CPU only. On a GPU that would synchronize; there an index out of
        range is a device error.
        """
        tensors: tuple[Tensor, ...] = (self.positions_N, self.tokens_N, self.sequences_N)
        if self.token_positions_N is not None:
            tensors = (*tensors, self.token_positions_N)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            return [f"positions, tokens and sequences have shapes {shapes}, not one [N]"]
        if {tensor.dtype for tensor in tensors} != {torch.int64}:
            return ["positions, tokens and sequences are not all int64"]
        if self.num_sequences < 0 or (self.num_sequences == 0) != (shapes[0] == (0,)):
            return [f"{shapes[0][0]} targets for {self.num_sequences} sequences"]
        if self.num_sequences == 0 or self.positions_N.device.type != "cpu":
            return []
        num_positions = self.shape[0] * self.shape[1]
        limits = (
            ("positions_N", self.positions_N, num_positions, "positions"),
            ("sequences_N", self.sequences_N, self.num_sequences, "sequences"),
        )
        messages = [
            f"{name} has values from {int(values.min())} to {int(values.max())}, "
            f"but there are {limit} {unit}"
            for name, values, limit, unit in limits
            if values.min() < 0 or values.max() >= limit
        ]
        if not messages and len(self.sequences_N.unique()) < self.num_sequences:
            messages.append("a sequence has no target")
        return messages


def digest_of(positions_N: Tensor, tokens_N: Tensor, sequences_N: Tensor) -> Tensor:
    """A number, int64 `[]`, that differs between micro-batches: ranks compare it, not tokens."""
    # Wraps around, the same on every device. Squares: a sum of products would not see how tokens
    # are assigned to positions.
    mixed_N = (tokens_N * 1_000_003 + positions_N) * 1_000_033 + sequences_N
    return (mixed_N * mixed_N).sum()


def _check_first(location: str, sequences: Tensor) -> None:
    if len(sequences):
        message = f"sequence {int(sequences[0])} begins with a response token"
        raise DataError.at(location, message, "nothing predicts it: begin with a BOS or a prompt")


def _check_complete(location: str, sequence_N: Tensor, num_sequences: int) -> None:
    """Check that every sequence has a target."""
    present = torch.zeros(num_sequences, dtype=torch.bool, device=sequence_N.device)
    present[sequence_N] = True
    if not bool(present.all()):
        sequence = int((~present).nonzero()[0])
        message = f"sequence {sequence} of {num_sequences} has no response token"
        raise DataError.at(location, message, "drop its pair, or keep more of its answer")
