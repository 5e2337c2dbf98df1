"""All preference pairs of a run, from sources to random access: `load_pairs`.

A `PairDataset` is a sequence of `Pair`s over memory-mapped stores, concatenated in the order of the
sources. Weights and slices are an index array on top: no copies. It knows where each pair was read,
and its fingerprint depends on exactly its tokens in its order, not on the files they came from.
`pairs.py` has the training order and `packing/batches.py` builds batches.

Shapes: P pairs of the dataset; S pairs of all stores together; 3 = prompt, chosen, rejected.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.pairs import IntArray, Pair, stream_pairs
from megatron_idpo.data.report import DataReport
from megatron_idpo.data.sources.open import OpenSource, open_source
from megatron_idpo.data.tokenize.build_store import OnBadRow, tokenized_store
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.store import PairStore
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import DataError
from megatron_idpo.storage.atomic import atomic_file


class PairDataset:
    """Tokenized pairs by index: a `PairSource`; picklable, and safe to read from threads.

    Attributes:
        sources: what the stores were built from, in their order.
    """

    def __init__(
        self,
        stores: Sequence[tuple[OpenSource, PairStore]],
        order_P: NDArray[np.int64] | None = None,
    ) -> None:
        """Args: sources with their stores, and which of their pairs in which order (None: all).

        `order_P` is int64 [P], each 0 <= index < S; an index may occur more than once.
        """
        self.sources = [source for source, _ in stores]
        self._stores = [store for _, store in stores]
        sizes = np.array([store.num_pairs for store in self._stores], np.int64)
        self._starts = np.cumsum(sizes) - sizes
        self._order_P = order_P
        self._num_pairs = int(sizes.sum()) if order_P is None else len(order_P)

    def __len__(self) -> int:
        """The number of pairs P."""
        return self._num_pairs

    def __getitem__(self, index: int, /) -> Pair:
        """The pair at `index`, 0 <= index < P; its arrays are read-only views of the file."""
        store, at = self._locate(index)
        return Pair(index, *self._stores[store].tokens(at))

    @cached_property
    def lengths_P3(self) -> IntArray:
        """int32 [P, 3]: tokens in prompt, chosen and rejected of every pair."""
        if len(self._stores) == 1:
            lengths_S3 = self._stores[0].lengths_P3
        else:
            lengths_S3 = np.concatenate([store.lengths_P3 for store in self._stores])
        return lengths_S3 if self._order_P is None else lengths_S3[self._order_P]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the tokens of all pairs, in order: a reference cache's key."""
        parts = [store.fingerprint for store in self._stores]
        if len(parts) == 1 and self._order_P is None:
            return parts[0]
        total = hashlib.sha256(" ".join(parts).encode())
        if self._order_P is not None:
            total.update(self._order_P.astype("<i8").tobytes())
        return total.hexdigest()

    @property
    def report(self) -> DataReport:
        """Counts of the sources' rows, before weights and slices."""
        total = DataReport()
        for source, store in zip(self.sources, self._stores, strict=True):
            total.add(store.report, source.location)
        return total

    @property
    def source_names(self) -> tuple[str, ...]:
        """The paths of the sources as configured."""
        return tuple(source.source.path for source in self.sources)

    @cached_property
    def source_P(self) -> NDArray[np.int64]:
        """int64 [P]: which of `source_names` each pair comes from."""
        order_P = np.arange(self._num_pairs) if self._order_P is None else self._order_P
        return np.searchsorted(self._starts, order_P, side="right") - 1

    @property
    def highest_token(self) -> int:
        """The largest token id in the stores; the model's vocabulary must contain it."""
        return max(store.highest_token for store in self._stores)

    def location(self, index: int) -> str:
        """Where a pair was read, as `file:row`, for messages."""
        store, at = self._locate(index)
        return self.sources[store].location(*self._stores[store].source_row(at))

    def select(self, indices_K: IntArray) -> "PairDataset":
        """The dataset of these pairs, int [K], in this order; nothing is copied."""
        order_K = np.asarray(indices_K, np.int64)
        if self._order_P is not None:
            order_K = self._order_P[order_K]
        return PairDataset(list(zip(self.sources, self._stores, strict=True)), order_K)

    def _locate(self, index: int) -> tuple[int, int]:
        """The index of the store, and of the pair in it."""
        if not 0 <= index < self._num_pairs:
            raise IndexError(f"pair {index} of {self._num_pairs}")
        at = int(index if self._order_P is None else self._order_P[index])
        store = int(np.searchsorted(self._starts, at, side="right")) - 1
        return store, at - int(self._starts[store])


def load_pairs(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    options: TokenOptions | None = None,
    *,
    cache: Path | None = None,
    num_workers: int | None = None,
    on_bad_row: OnBadRow = "error",
    bad_rows_file: Path | None = None,
    seed: int = 0,
) -> PairDataset:
    """Read, tokenize and mix sources; sources in the cache are only opened.

    A source's `weight` says how often its pairs occur in one epoch: the integer part of the weight
    for every pair, the fraction for a sample of them that depends on `seed` and the source's index.

    Args:
        sources: one or more.
        tokenizer: see `tokenizers.load_tokenizer`.
        options: lengths, truncation and format; None for the defaults.
        cache: directory for tokenized pairs; None for one in the cache of `datasets`.
        num_workers: processes; None for one per core.
        on_bad_row: stop at rows that are not pairs, or leave them out.
        bad_rows_file: under `skip`, a JSON-lines file to list them in: file, row, reason.
        seed: of the sampling of fractional weights.

    Raises:
        DataError: naming file, row and reason for bad rows; a source that cannot be read, is empty,
            or has no pair left.
    """
    assert sources, "a run needs a source"
    options = options or TokenOptions()
    if cache is None:
        from datasets.config import HF_DATASETS_CACHE

        cache = Path(HF_DATASETS_CACHE) / "megatron_idpo"
    stores = []
    for config in sources:
        source = open_source(config)
        store = tokenized_store(
            source,
            tokenizer,
            replace(options, format=config.format or options.format),
            cache=cache,
            # Only the cores that this process may use.
            num_workers=num_workers or len(os.sched_getaffinity(0)),
            on_bad_row=on_bad_row,
        )
        stores.append((source, store))
    if on_bad_row == "skip" and bad_rows_file is not None:
        _list_bad_rows(stores, bad_rows_file)
    for source, store in stores:
        if not store.num_pairs:
            _raise_no_pairs(source, store)
    return PairDataset(stores, _weighted_order(stores, seed))


def _weighted_order(
    stores: Sequence[tuple[OpenSource, PairStore]], seed: int
) -> NDArray[np.int64] | None:
    """Indices into all stores' pairs, by weight; None if all weights are 1."""
    if all(source.source.weight == 1 for source, _ in stores):
        return None
    pieces, start = [], 0
    for index, (source, store) in enumerate(stores):
        weight, size = source.source.weight, store.num_pairs
        pieces += [np.arange(start, start + size)] * int(weight)
        num_sampled = round((weight - int(weight)) * size)
        if num_sampled:
            sample = stream_pairs(0, num_sampled, num_pairs=size, seed=seed + index)
            pieces.append(start + np.sort(sample))
        elif weight < 1:
            message = f"weight {weight} leaves none of its {size} pairs"
            raise DataError.at(source.source.path, message, f"set it to at least {1 / size:.2g}")
        start += size
    return np.concatenate(pieces)


def _raise_no_pairs(source: OpenSource, store: PairStore) -> None:
    reasons = Counter(bad.reason for bad in store.bad_rows()) + Counter(store.report.dropped_pairs)
    counts = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    raise DataError.at(
        source.source.path,
        f"none of its {store.report.rows} rows is left: {counts}",
        "check data.max_length, data.truncation and the rows themselves",
    )


def _list_bad_rows(stores: Sequence[tuple[OpenSource, PairStore]], path: Path) -> None:
    """Write the list of skipped rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        # Concurrent: several ranks may write the same file.
        atomic_file(path, concurrent=True) as temporary,
        # A file name may not be valid UTF-8: JSON escapes then replace the invalid bytes.
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for source, store in stores:
            for bad in store.bad_rows():
                name = source.parts[bad.part].name
                line = {"file": name, "row": bad.row, "reason": bad.reason}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
