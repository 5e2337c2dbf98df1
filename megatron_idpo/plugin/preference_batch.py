"""`PreferenceBatch`: what the losses of one micro-batch need in addition to the model's input.

P  pairs; 2P answers: 2p is pair p's chosen answer, 2p + 1 its rejected one
Q  sequences of the micro-batch, in the order of its targets
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from megatron_idpo.errors import DataError, Problem
from megatron_idpo.plugin.targets import Targets


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch:
    """One micro-batch of preference pairs. Both answers of a pair are in the same micro-batch."""

    targets: Targets
    """The response tokens of all sequences."""

    pairs: Tensor | None = None
    """int64 `[P, 2]`: the chosen and the rejected sequence of each pair. None: sequences alternate,
    chosen first."""

    reference_logps: Mapping[int, Tensor] = field(default_factory=dict)
    """The reference's log-probability of each answer, by layer (including the final one), float32
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

    mean_chosen_tokens: float = 0.0
    """Tokens per chosen answer, over all pairs of the global batch. Required by the loss `sft`."""

    def __post_init__(self) -> None:
        """Check what can be checked without synchronizing a GPU.

        Raises:
            DataError: the parts do not fit together.
        """
        messages = [*self.targets.validate(), *self._validate_pairs(), *self._validate_reference()]
        if messages:
            location = f"micro-batch {self.index}"
            remedy = "build all parts from the same sequences (Targets.from_mask)"
            raise DataError.of([Problem(location, message, remedy) for message in messages])

    @property
    def num_pairs(self) -> int:
        """P; 0 in an empty micro-batch."""
        return self.targets.num_sequences // 2 if self.pairs is None else len(self.pairs)

    def by_answer(self, values_Q: Tensor) -> Tensor:
        """Values per sequence in the order of the answers: `[2P]`, connected to the graph."""
        if self.pairs is None:
            return values_Q
        return values_Q.index_select(0, self.pairs.flatten())

    def lengths(self) -> Tensor:
        """Response tokens of each answer, float32 `[2P]`."""
        return self.by_answer(self.targets.lengths())

    def to(self, device: torch.device | str) -> Self:
        """This batch on another device."""
        return replace(
            self,
            targets=self.targets.to(device),
            pairs=None if self.pairs is None else self.pairs.to(device),
            reference_logps={
                layer: logps_2P.to(device, non_blocking=True)
                for layer, logps_2P in self.reference_logps.items()
            },
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the targets against the vocabulary.

        Raises:
            DataError: a target is not in the vocabulary.
        """
        tokens_N = self.targets.tokens_N
        # On a GPU this would synchronize; there the loss of such a target is inf.
        if tokens_N.device.type == "cpu" and tokens_N.numel():
            least, most = int(tokens_N.min()), int(tokens_N.max())
            if least < 0 or most >= vocab_size:
                message = f"target tokens from {least} to {most} in a vocabulary of {vocab_size}"
                remedy = "use the tokenizer of this vocab_size"
                raise DataError.at(f"micro-batch {self.index}", message, remedy)

    def _validate_pairs(self) -> list[str]:
        pairs_P2, num_sequences = self.pairs, self.targets.num_sequences
        if pairs_P2 is None:
            if num_sequences % 2:
                return [f"{num_sequences} sequences do not alternate; pairs must name them"]
            return []
        if pairs_P2.dim() != 2 or pairs_P2.shape[1] != 2 or pairs_P2.dtype != torch.int64:
            return [
                f"pairs are {pairs_P2.dtype} of shape {tuple(pairs_P2.shape)}, not int64 [P, 2]"
            ]
        if pairs_P2.device.type != "cpu" or not pairs_P2.numel():
            return []
        least, most = int(pairs_P2.min()), int(pairs_P2.max())
        if least < 0 or most >= num_sequences:
            return [f"pairs name sequences {least} to {most} of {num_sequences}"]
        if len(same := (pairs_P2[:, 0] == pairs_P2[:, 1]).nonzero()):
            pair = int(same[0])
            return [f"pair {pair} has sequence {int(pairs_P2[pair, 0])} twice"]
        return []

    def _validate_reference(self) -> list[str]:
        if self.reference_free and self.reference_logps:
            return ["has reference_logps although it is reference_free"]
        num_answers = 2 * self.num_pairs
        messages = []
        for layer, logps_2P in self.reference_logps.items():
            if tuple(logps_2P.shape) != (num_answers,):
                shape = tuple(logps_2P.shape)
                messages.append(f"reference_logps[{layer}] has shape {shape}, not ({num_answers},)")
            # Sums over many tokens: 16 bits would round them to whole units.
            if logps_2P.dtype not in (torch.float32, torch.float64):
                messages.append(f"reference_logps[{layer}] is {logps_2P.dtype}, not float32")
            if logps_2P.device.type == "cpu" and not bool(logps_2P.isfinite().all()):
                messages.append(f"reference_logps[{layer}] has NaN or inf")
        return messages
