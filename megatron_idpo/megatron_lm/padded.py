"""Padded micro-batches of preference pairs, in the order of Megatron-LM's samples.

A sample of Megatron-LM is one answer with its prompt, so a pair is two samples and a micro-batch of
b samples has b / 2 pairs, chosen and rejected alternating. Every stage and every tensor-parallel
rank builds the micro-batches of its data-parallel rank itself: targets and reference are needed on
each tapped stage, and nothing has to be sent.

    B  samples of a micro-batch   S  positions (`--seq-length`)   P  pairs
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_idpo.data.pairs import Pair, PairSource, stream_pairs
from megatron_idpo.errors import DataError
from megatron_idpo.plugin.targets import Targets

_PAD_TOKEN = 0
"""Behind a causal mask no answer sees it, and it is not scored."""


class Padded(NamedTuple):
    """The model's input for some pairs, on the CPU."""

    tokens_BS: Tensor
    position_ids_BS: Tensor
    targets: Targets


def padded(pairs: Sequence[Pair], num_positions: int) -> Padded:
    """Both answers of each pair as rows, padded at the end.

    Args:
        pairs: with at most `num_positions` tokens of prompt and answer (`check_lengths`).
        num_positions: S.
    """
    rows = [
        (pair.prompt_tokens, answer)
        for pair in pairs
        for answer in (pair.chosen_tokens, pair.rejected_tokens)
    ]
    tokens_BS = np.full((len(rows), num_positions), _PAD_TOKEN, np.int64)
    for row_S, (prompt, answer) in zip(tokens_BS, rows, strict=True):
        row_S[: len(prompt) + len(answer)] = np.concatenate([prompt, answer])
    tokens = torch.from_numpy(tokens_BS)
    targets = Targets.from_lengths(
        tokens,
        [len(prompt) for prompt, _ in rows],
        [len(prompt) + len(answer) for prompt, answer in rows],
    )
    position_ids = torch.arange(num_positions).expand(len(rows), -1)
    return Padded(tokens, position_ids, targets)


def check_lengths(pairs: PairSource, num_positions: int) -> None:
    """Check that every answer fits with its prompt.

    Raises:
        DataError: some do not.
    """
    lengths_P3 = pairs.lengths_P3
    tokens_P = lengths_P3[:, 0] + lengths_P3[:, 1:].max(axis=1)
    if too_long := int((tokens_P > num_positions).sum()):
        message = f"{too_long} of {len(pairs)} pairs are longer, up to {int(tokens_P.max())} tokens"
        remedy = "raise --seq-length, or truncate (load_pairs, TokenOptions.max_length)"
        raise DataError.at(f"--seq-length {num_positions}", message, remedy)


class Order(NamedTuple):
    """How a global batch is divided."""

    micro_batch_pairs: int
    num_micro_batches: int
    """Of one data-parallel rank in one step."""

    data_rank: int
    data_size: int

    @property
    def global_pairs(self) -> int:
        """Pairs of a step over all data-parallel ranks."""
        return self.micro_batch_pairs * self.num_micro_batches * self.data_size

    def of_rank(self, pairs_P: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of a step's pairs, as Megatron-LM's samplers divide samples."""
        size = self.micro_batch_pairs
        starts = range(0, self.global_pairs, size)[self.data_rank :: self.data_size]
        return [list(pairs_P[start : start + size]) for start in starts]


def training_steps(
    order: Order, num_pairs: int, *, consumed_pairs: int, seed: int
) -> Iterator[list[list[int]]]:
    """This rank's micro-batches of every step, endless; the stream of `data/pairs.py`."""
    while True:
        step = stream_pairs(consumed_pairs, order.global_pairs, num_pairs=num_pairs, seed=seed)
        yield order.of_rank(step.tolist())
        consumed_pairs += order.global_pairs


def steps_in_order(order: Order, num_pairs: int, num_steps: int) -> Iterator[list[list[int]]]:
    """This rank's micro-batches of pair 0, 1, ...; from 0 again where the steps have more pairs."""
    for step in range(num_steps):
        first = step * order.global_pairs
        pairs = [pair % num_pairs for pair in range(first, first + order.global_pairs)]
        yield order.of_rank(pairs)
