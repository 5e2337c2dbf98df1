"""Global batches: which pairs, in which rows, on which data-parallel rank, in which order.

Every rank computes the whole plan from the pairs' lengths, the seed and the number of consumed
pairs, and builds only its own rows. Tensor and pipeline ranks therefore have the same rows without
communication, and a run resumes with exactly the next pair, also with a different number of
data-parallel ranks. The order is `pairs.stream_pairs`: epochs follow each other without a gap, and
a batch may contain pairs of two epochs; the last batch of the last epoch is dropped if it is not
full (`TrainingBatches.dropped_pairs`).

A loss must be averaged over `Batch.num_pairs`, never over rows or over a rank's own pairs.

Shapes: P pairs in the collection, B pairs in the global batch, 3 = prompt, chosen, rejected.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_idpo.data.packing.plan import plan_rows, trimmed_length
from megatron_idpo.data.packing.rows import Row, check_lengths
from megatron_idpo.data.pairs import IntArray, PairSource, pair_tokens, stream_pairs
from megatron_idpo.errors import CheckpointError, DataError, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How rows are laid out and distributed; the same on every rank, except for `data_rank`."""

    row_tokens: int
    """Maximum positions in a row; no pair may need more."""

    pad_token: int
    share_prompt: bool = True
    trim_tokens: int = 128
    """Trim a batch's rows, all to the same length, to the smallest multiple of this that holds the
    fullest one; 0: no trimming. Sequence parallelism needs a multiple of the tensor size."""

    trim_rows_separately: bool = False
    """Trim each row to its own length rather than to the fullest one's: less padding, possible
    where nothing is sent between pipeline stages."""

    rows_multiple: int = 1
    """Rows on a rank are a multiple of this: the pipeline size under interleaving."""

    data_size: int = 1
    data_rank: int = 0


class PlannedRow(NamedTuple):
    """A row of a global batch before it is built."""

    pairs: list[int]
    """Which of the B pairs, ascending."""

    used_tokens: int
    row_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's part of a global batch; all fields except `rows` are the same on every rank."""

    rows: tuple[Row, ...]
    """This rank's micro-batches; as many as on every other rank, 1 or more."""

    num_pairs: int
    """Pairs in the global batch, over all data-parallel ranks: the loss is averaged over these."""

    consumed_pairs: int
    """Pairs of the run up to and including this batch."""

    used_tokens: int
    """Positions that hold a token, over all data-parallel ranks."""

    chosen_tokens: int
    """Tokens of all chosen answers of the global batch."""

    computed_tokens: int
    """Positions in all rows of all data-parallel ranks, padding and empty rows included."""

    @property
    def mean_chosen_tokens(self) -> float:
        """Tokens per chosen answer of the global batch."""
        return self.chosen_tokens / self.num_pairs

    @property
    def row_tokens(self) -> int:
        """Positions in the longest of these rows."""
        return max(len(row.tokens_T) for row in self.rows)


def plan_batch(lengths_B3: IntArray, settings: RowSettings) -> list[list[PlannedRow]]:
    """The rows of every rank for a global batch of pairs with these lengths: [rank][row]."""
    plan = plan_rows(
        lengths_B3,
        row_tokens=settings.row_tokens,
        trim_tokens=settings.trim_tokens,
        share_prompt=settings.share_prompt,
        ranks=settings.data_size,
        multiple=settings.rows_multiple,
    )
    tokens_B = pair_tokens(lengths_B3, share_prompt=settings.share_prompt)
    trim_tokens = settings.trim_tokens if settings.trim_rows_separately else 0

    def planned(pairs: list[int]) -> PlannedRow:
        used_tokens = int(tokens_B[pairs].sum())
        length = trimmed_length(used_tokens, row_tokens=plan.row_tokens, trim_tokens=trim_tokens)
        return PlannedRow(pairs, used_tokens, length)

    return [[planned(pairs) for pairs in rows] for rows in plan.pairs]


def build_batch(
    pairs: PairSource, index_B: IntArray, settings: RowSettings, *, consumed_pairs: int
) -> Batch:
    """This rank's part of the global batch made of the pairs `index_B` of the collection."""
    lengths_B3 = pairs.lengths_P3[index_B]
    plan = plan_batch(lengths_B3, settings)
    rows = tuple(
        Row.build(
            [pairs[int(index_B[pair])] for pair in row.pairs],
            row.row_tokens,
            settings.pad_token,
            share_prompt=settings.share_prompt,
        )
        for row in plan[settings.data_rank]
    )
    return Batch(
        rows=rows,
        num_pairs=len(index_B),
        consumed_pairs=consumed_pairs,
        used_tokens=sum(row.used_tokens for rank in plan for row in rank),
        chosen_tokens=int(lengths_B3[:, 1].sum()),
        computed_tokens=sum(row.row_tokens for rank in plan for row in rank),
    )


def check_pairs(pairs: PairSource, settings: RowSettings) -> None:
    """Check, before training starts, that every pair of a collection can be laid out.

    Raises:
        DataError: no pairs, an empty prompt or answer, or a pair longer than a row.
    """
    assert 0 <= settings.data_rank < settings.data_size, settings
    assert settings.rows_multiple >= 1, settings
    if not len(pairs):
        raise DataError.at("data", "no pairs left", "see the report of dropped pairs")
    assert pairs.lengths_P3.shape == (len(pairs), 3), pairs.lengths_P3.shape
    check_lengths(
        pairs.lengths_P3,
        row_tokens=settings.row_tokens,
        share_prompt=settings.share_prompt,
        # A `PairDataset` knows file and row.
        location=getattr(pairs, "location", "pair {}".format),
    )


@dataclass(eq=False)
class _Batches:
    """What training and evaluation batches share: checks, and building ahead on a thread.

    Creating it checks every length and builds nothing yet.

    Raises:
        DataError: see `check_pairs`.
    """

    pairs: PairSource
    settings: RowSettings
    _: KW_ONLY
    global_batch_pairs: int
    """Pairs in every batch, B."""

    prefetch_batches: int = 2
    """How many batches to build ahead on a thread, 1 or more."""

    def __post_init__(self) -> None:
        """See the class."""
        assert self.global_batch_pairs >= 1, self.global_batch_pairs
        check_pairs(self.pairs, self.settings)

    def _build_ahead(self, batches: Iterable[tuple[int, IntArray]]) -> Iterator[Batch]:
        """Build a batch for each (consumed pairs, indices); the thread ends with the loop."""
        built = (
            build_batch(self.pairs, index_B, self.settings, consumed_pairs=consumed_pairs)
            for consumed_pairs, index_B in batches
        )
        with closing(prefetch(built, self.prefetch_batches)) as ahead:
            yield from ahead


@dataclass(kw_only=True, eq=False)
class TrainingBatches(_Batches):
    """The global batches of a run, from the first pair not yet consumed to the end of the epochs.

    `for batch in batches` advances `consumed_pairs` when it yields a batch, independent of what has
    been prefetched; a new loop continues from there. `state_dict` is the part of a checkpoint.

    Raises:
        DataError: see `check_pairs`; or fewer pairs in all epochs together than one batch needs.
    """

    seed: int
    """Of the order."""

    epochs: int = 1
    """How often each pair is used, 1 or more."""

    consumed_pairs: int = field(default=0, init=False)
    """Pairs yielded since the run began, the last batch's included."""

    def __post_init__(self) -> None:
        """See the class."""
        super().__post_init__()
        assert self.epochs >= 1, self.epochs
        num_pairs, size = len(self.pairs), self.global_batch_pairs
        self._stream_pairs = self.epochs * num_pairs
        if self._stream_pairs < size:
            raise DataError.at(
                "training.global_batch_pairs",
                f"one batch needs {size} pairs, the run has {self.epochs} x {num_pairs}",
                f"use at most {self._stream_pairs}, more data or more epochs",
            )

    @property
    def epoch(self) -> float:
        """Completed epochs, with their fraction."""
        return self.consumed_pairs / len(self.pairs)

    @property
    def remaining_batches(self) -> int:
        """Batches still to come."""
        return max(0, self._stream_pairs - self.consumed_pairs) // self.global_batch_pairs

    @property
    def dropped_pairs(self) -> int:
        """Pairs at the end of the last epoch that do not fill a batch and are left out."""
        return max(0, self._stream_pairs - self.consumed_pairs) % self.global_batch_pairs

    def __iter__(self) -> Iterator[Batch]:
        """The remaining batches."""
        for batch in self._build_ahead(self._plan_stream(self.consumed_pairs)):
            self.consumed_pairs = batch.consumed_pairs
            yield batch

    def _plan_stream(self, first: int) -> Iterator[tuple[int, IntArray]]:
        size, num_pairs = self.global_batch_pairs, len(self.pairs)
        for end in range(first + size, self._stream_pairs + 1, size):
            yield end, stream_pairs(end - size, size, num_pairs=num_pairs, seed=self.seed)

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, with the seed and the size that define the stream."""
        num_pairs = len(self.pairs)
        return {"consumed_pairs": self.consumed_pairs, "seed": self.seed, "num_pairs": num_pairs}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after `consumed_pairs` in the next loop; ranks and batch size may differ.

        Raises:
            CheckpointError: the state belongs to another order or another collection, so that
                pairs would be used twice or never.
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
        self.consumed_pairs = int(state["consumed_pairs"])


class EvaluationBatches(_Batches):
    """Every pair exactly once, in the collection's order; the last batch may be smaller.

    Each loop starts from the first pair. `Batch.num_pairs` is the true number of pairs, also of the
    last batch.
    """

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.pairs) // self.global_batch_pairs)

    def __iter__(self) -> Iterator[Batch]:
        """All batches."""
        size, num_pairs = self.global_batch_pairs, len(self.pairs)
        ends = range(size, num_pairs + size, size)
        return self._build_ahead(
            (min(end, num_pairs), np.arange(end - size, min(end, num_pairs))) for end in ends
        )


def prefetch[Item](items: Iterable[Item], ahead: int) -> Generator[Item, None, None]:
    """Yield `items` in order, up to `ahead` (1 or more) of them computed in advance on a thread.

    The thread starts with the first `next` and ends with the generator: when it is exhausted, when
    an error passes through, or at `close()`, which waits for the item being computed.

    Raises:
        Exception: the error of computing an item, in the place of that item.
    """
    assert ahead >= 1, ahead
    iterator, end = iter(items), object()
    # One worker: items are computed one after the other, in order.
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        try:
            window = deque(pool.submit(next, iterator, end) for _ in range(ahead))
            while (item := window.popleft().result()) is not end:
                window.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc]  # `end` is never yielded
        finally:
            pool.shutdown(cancel_futures=True)
