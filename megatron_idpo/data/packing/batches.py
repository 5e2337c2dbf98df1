"""Global batches: which pairs, in which rows, on which data-parallel rank, in which order.

Every rank works out the whole plan from the pairs' lengths, the seed and the number of consumed
pairs, and builds only its own rows. So tensor and pipeline ranks have the same rows without any
communication, and a run continues with exactly the next pair, with another number of data-parallel
ranks too. The order is that of `order.py`: epoch follows epoch, and a batch may straddle two; the
last batch of the last epoch is left out when it is not full (`TrainingBatches.dropped_pairs`).

A loss must be averaged over `Batch.num_pairs`, never over rows or over a rank's own pairs.

Shapes: P pairs in the collection, B pairs in the global batch, 3 = prompt, chosen, rejected.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.packing.epoch_order import stream_pairs
from megatron_idpo.data.packing.plan import Plan, plan_rows
from megatron_idpo.data.packing.prefetch import prefetch
from megatron_idpo.data.packing.rows import Row, check_lengths, occupied_tokens
from megatron_idpo.data.tokenize.pair import IntArray, PairSource
from megatron_idpo.errors import CheckpointError, DataError, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How rows are laid out and shared among ranks; the same on every rank, but for `data_rank`."""

    row_tokens: int
    """Positions in a row at most; no pair may need more."""

    pad_token: int
    share_prompt: bool = True
    trim_tokens: int = 128
    """Cut a batch's rows, all to one length, to the smallest multiple of this that holds the
    fullest one; 0: never cut. Sequence parallelism needs a multiple of the tensor size."""

    own_lengths: bool = False
    """Cut each row by itself rather than all to the fullest one's length: less padding, where
    nothing is sent between pipeline stages and rows need not be equal."""

    rows_multiple: int = 1
    """Rows on a rank are a multiple of this: the pipeline size under interleaving."""

    data_size: int = 1
    data_rank: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one rank runs for one global batch; all but `rows` is the same on every rank."""

    rows: tuple[Row, ...]
    """This rank's micro-batches; as many as on every other rank, 1 or more."""

    num_pairs: int
    """Pairs in the global batch, over all data-parallel ranks: what the loss is averaged over."""

    consumed_pairs: int
    """Pairs of the run up to and including this batch."""

    used_tokens: int
    """Positions that hold a token, over all data-parallel ranks."""

    computed_tokens: int
    """Positions in all rows of all data-parallel ranks, padding and empty rows included."""

    @property
    def row_tokens(self) -> int:
        """Positions in the longest of these rows; in each, but with `RowSettings.own_lengths`."""
        return max(len(row.tokens_T) for row in self.rows)


def plan_batch(lengths_B3: IntArray, settings: RowSettings) -> Plan:
    """The rows of a global batch of pairs with these lengths, on every rank."""
    return plan_rows(
        lengths_B3,
        row_tokens=settings.row_tokens,
        trim_tokens=settings.trim_tokens,
        share_prompt=settings.share_prompt,
        ranks=settings.data_size,
        multiple=settings.rows_multiple,
    )


def row_lengths(plan: Plan, tokens_B: NDArray[np.int64], settings: RowSettings) -> list[list[int]]:
    """Positions in every row of a plan, [rank][row].

    Args:
        plan: of the pairs with these tokens.
        tokens_B: int64 [B], positions that each pair needs.
        settings: how rows are cut.
    """
    trim = settings.trim_tokens
    if not (settings.own_lengths and trim):
        return [[plan.row_tokens] * len(rows) for rows in plan.pairs]
    used = [[int(tokens_B[row].sum()) for row in rows] for rows in plan.pairs]
    return [[min(plan.row_tokens, max(1, -(-n // trim)) * trim) for n in rows] for rows in used]


def build_batch(
    pairs: PairSource, index_B: IntArray, settings: RowSettings, *, consumed_pairs: int
) -> Batch:
    """This rank's part of the global batch made of the pairs `index_B` of the collection."""
    lengths_B3 = pairs.lengths_P3[index_B]
    plan = plan_batch(lengths_B3, settings)
    tokens_B = occupied_tokens(lengths_B3, share_prompt=settings.share_prompt)
    lengths = row_lengths(plan, tokens_B, settings)
    mine = settings.data_rank
    rows = tuple(
        Row.build(
            [pairs[int(index_B[pair])] for pair in row],
            length,
            settings.pad_token,
            share_prompt=settings.share_prompt,
        )
        for row, length in zip(plan.pairs[mine], lengths[mine], strict=True)
    )
    return Batch(
        rows=rows,
        num_pairs=len(index_B),
        consumed_pairs=consumed_pairs,
        used_tokens=int(tokens_B.sum()),
        computed_tokens=sum(map(sum, lengths)),
    )


def check_pairs(pairs: PairSource, settings: RowSettings) -> None:
    """Refuse a collection that could not be trained on to its end, before it begins."""
    assert 0 <= settings.data_rank < settings.data_size, settings
    assert settings.rows_multiple >= 1, settings
    if not len(pairs):
        raise DataError.at("data", "there is not a single pair", "see the report of dropped pairs")
    assert pairs.lengths_P3.shape == (len(pairs), 3), pairs.lengths_P3.shape
    check_lengths(
        pairs.lengths_P3,
        row_tokens=settings.row_tokens,
        share_prompt=settings.share_prompt,
        location=getattr(pairs, "location", None),  # A `PairDataset` knows file and row.
    )


class TrainingBatches:
    """The global batches of a run, from the first pair not yet consumed to the end of the epochs.

    `for batch in batches` advances `consumed_pairs` as it hands a batch out, whatever has been
    prefetched; a new loop goes on from there. `state_dict` is what a checkpoint keeps.
    """

    def __init__(
        self,
        pairs: PairSource,
        settings: RowSettings,
        *,
        global_batch_pairs: int,
        seed: int,
        epochs: int = 1,
        prefetch_batches: int = 2,
    ) -> None:
        """Check every length; build nothing yet.

        Args:
            pairs: the tokenised collection.
            settings: rows and ranks.
            global_batch_pairs: pairs in every batch, B.
            seed: of the order.
            epochs: how often each pair is met, 1 or more.
            prefetch_batches: how many batches to build ahead on a thread, 1 or more.

        Raises:
            DataError: no pairs, an empty prompt or answer, a pair longer than a row, or fewer pairs
                in all epochs together than one batch needs.
        """
        assert global_batch_pairs >= 1, global_batch_pairs
        assert epochs >= 1, epochs
        check_pairs(pairs, settings)
        self._pairs = pairs
        self._settings = settings
        self._global_batch_pairs = global_batch_pairs
        self._seed = seed
        self._prefetch_batches = prefetch_batches
        self._stream_pairs = epochs * len(pairs)
        self._consumed_pairs = 0
        if self._stream_pairs < global_batch_pairs:
            raise DataError.at(
                "training.global_batch_pairs",
                f"{global_batch_pairs} pairs do not fill from {epochs} x {len(pairs)} pairs",
                f"use at most {self._stream_pairs}, more data or more epochs",
            )

    @property
    def consumed_pairs(self) -> int:
        """Pairs handed out since the run began, the last batch's included."""
        return self._consumed_pairs

    @property
    def epoch(self) -> float:
        """Epochs behind us, with their fraction."""
        return self._consumed_pairs / len(self._pairs)

    @property
    def remaining_batches(self) -> int:
        """Batches still to come."""
        return max(0, self._stream_pairs - self._consumed_pairs) // self._global_batch_pairs

    @property
    def dropped_pairs(self) -> int:
        """Pairs at the end of the last epoch that fill no batch and are left out."""
        return max(0, self._stream_pairs - self._consumed_pairs) % self._global_batch_pairs

    def __iter__(self) -> Iterator[Batch]:
        """The remaining batches, built ahead on a thread that ends with the loop."""
        with closing(prefetch(self._build(self._consumed_pairs), self._prefetch_batches)) as built:
            for batch in built:
                self._consumed_pairs = batch.consumed_pairs
                yield batch

    def _build(self, consumed_pairs: int) -> Generator[Batch, None, None]:
        """Build batch after batch, starting behind `consumed_pairs`."""
        size = self._global_batch_pairs
        while consumed_pairs + size <= self._stream_pairs:
            index_B = stream_pairs(
                consumed_pairs, size, num_pairs=len(self._pairs), seed=self._seed
            )
            consumed_pairs += size
            yield build_batch(self._pairs, index_B, self._settings, consumed_pairs=consumed_pairs)

    def state_dict(self) -> dict[str, int]:
        """Where the run stands: `consumed_pairs`, with the seed and size that give it a meaning."""
        return {
            "consumed_pairs": self._consumed_pairs,
            "seed": self._seed,
            "num_pairs": len(self._pairs),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue behind `consumed_pairs`, from the next loop on; ranks and batch size may differ.

        Raises:
            CheckpointError: the state belongs to another order or to another collection, so that
                pairs would be met twice or never.
        """
        problems = [
            Problem(
                f"{name} of the data",
                f"{state[name]} in the checkpoint, {here} in this run",
                "resume with the data and the seed that the run began with",
            )
            for name, here in self.state_dict().items()
            if name != "consumed_pairs" and state[name] != here
        ]
        if problems:
            raise CheckpointError.of(problems)
        self._consumed_pairs = int(state["consumed_pairs"])


class EvaluationBatches:
    """Every pair exactly once, in the collection's order; the last batch may be smaller.

    Each loop starts anew. `Batch.num_pairs` is the true number of pairs, also of the last batch.
    """

    def __init__(
        self,
        pairs: PairSource,
        settings: RowSettings,
        *,
        global_batch_pairs: int,
        prefetch_batches: int = 2,
    ) -> None:
        """Check every length; build nothing yet. Arguments and errors as in `TrainingBatches`."""
        assert global_batch_pairs >= 1, global_batch_pairs
        check_pairs(pairs, settings)
        self._pairs = pairs
        self._settings = settings
        self._global_batch_pairs = global_batch_pairs
        self._prefetch_batches = prefetch_batches

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self._pairs) // self._global_batch_pairs)

    def __iter__(self) -> Iterator[Batch]:
        """All batches, built ahead on a thread that ends with the loop."""
        with closing(prefetch(self._build(), self._prefetch_batches)) as built:
            yield from built

    def _build(self) -> Generator[Batch, None, None]:
        """Build batch after batch."""
        for first in range(0, len(self._pairs), self._global_batch_pairs):
            count = min(self._global_batch_pairs, len(self._pairs) - first)
            index_B = np.arange(first, first + count)
            yield build_batch(self._pairs, index_B, self._settings, consumed_pairs=first + count)
