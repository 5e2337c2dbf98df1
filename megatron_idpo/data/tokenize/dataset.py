"""All preference pairs of a run, from sources to random access: `load_pairs`.

A `PairDataset` is a sequence of `Pair`s over memory-mapped stores, one after the other in the order
of the sources. Weights and slices are an order on top: indices, no copies. It knows where each pair
was read, and its fingerprint names exactly its tokens in its order, whatever files they came from.
Shuffling and batches are `batches.py`.

Shapes: P pairs of the dataset; S pairs of all stores together; 3 = prompt, chosen, rejected.
"""

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.packing.epoch_order import stream_pairs
from megatron_idpo.data.report import DataReport
from megatron_idpo.data.sources.open import OpenSource, Source, open_source
from megatron_idpo.data.tokenize.build_store import OnBadRow, location, tokenized_store
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.pair import IntArray, Pair
from megatron_idpo.data.tokenize.process_map import available_cores
from megatron_idpo.data.tokenize.store import PairStore
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import DataError


@dataclass(frozen=True, slots=True)
class Origin:
    """The row that a pair was read from."""

    found: OpenSource
    part: int
    """Which of the source's parts."""

    row: int
    """1-based, within the part."""


class PairDataset:
    """Tokenised pairs by index; `PairSource` for packing, picklable, safe to read from threads."""

    def __init__(
        self,
        stores: Sequence[tuple[OpenSource, PairStore]],
        order_P: NDArray[np.int64] | None = None,
    ) -> None:
        """Args: sources with their stores, and which of all their pairs in which order (None: all).

        `order_P` is int64 [P], each 0 <= index < S; an index may occur more than once.
        """
        self._found = [found for found, _ in stores]
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
        """What became of the sources' rows, before weights and slices."""
        total = DataReport()
        for store in self._stores:
            total.add(store.report)
        return total

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources as they were given."""
        return tuple(found.source.path for found in self._found)

    @cached_property
    def source_P(self) -> NDArray[np.int64]:
        """int64 [P]: which of `source_names` each pair comes from."""
        order_P = np.arange(self._num_pairs) if self._order_P is None else self._order_P
        return np.searchsorted(self._starts, order_P, side="right") - 1

    @property
    def highest_token(self) -> int:
        """The largest token id in the stores; the model's vocabulary must reach it."""
        return max(store.highest_token for store in self._stores)

    def longest_pair_tokens(self, *, share_prompt: bool = True) -> int:
        """Row positions that the longest pair takes: `row_tokens` must be at least this."""
        lengths_P3 = self.lengths_P3
        prompts = 1 if share_prompt else 2
        totals_P = prompts * lengths_P3[:, 0] + lengths_P3[:, 1] + lengths_P3[:, 2]
        return int(totals_P.max())

    def location(self, index: int) -> str:
        """Where a pair was read, as `file:row`, for messages."""
        origin = self.origin(index)
        return location(origin.found, origin.part, origin.row)

    def origin(self, index: int) -> Origin:
        """Where a pair was read, for reading its record again."""
        store, at = self._locate(index)
        return Origin(self._found[store], *self._stores[store].origin(at))

    def select(self, indices_K: IntArray) -> "PairDataset":
        """The dataset of these pairs, int [K], in this order; nothing is copied."""
        chosen_K = np.asarray(indices_K, np.int64)
        order_K = chosen_K if self._order_P is None else self._order_P[chosen_K]
        return PairDataset(list(zip(self._found, self._stores, strict=True)), order_K)

    def _locate(self, index: int) -> tuple[int, int]:
        """Which store, and where in it."""
        if not 0 <= index < self._num_pairs:
            raise IndexError(f"pair {index} of {self._num_pairs}")
        at = int(index if self._order_P is None else self._order_P[index])
        store = int(np.searchsorted(self._starts, at, side="right")) - 1
        return store, at - int(self._starts[store])


def load_pairs(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: TokenOptions | None = None,
    *,
    cache: Path | None = None,
    num_workers: int | None = None,
    on_bad_row: OnBadRow = "error",
    bad_rows_file: Path | None = None,
    seed: int = 0,
) -> PairDataset:
    """Reads, tokenises and mixes sources; what was tokenised before is only opened.

    A source's `weight` says how often its pairs occur in one epoch: the whole part of the weight
    for every pair, the fraction for a sample of them that depends on `seed` and the source's place.

    Args:
        sources: one or more.
        tokenizer: see `tokenizers.load_tokenizer`.
        options: lengths, truncation and format; None for the defaults.
        cache: directory for tokenised pairs; None for one beside those of `datasets`.
        num_workers: processes; None for one per core.
        on_bad_row: stop at rows that are no pairs, or leave them out.
        bad_rows_file: under `skip`, a JSON-lines file to list them in: file, row, reason.
        seed: of the sampling of fractional weights.

    Raises:
        DataError: naming file, row and reason for bad rows; a source that cannot be read, is empty,
            or has no pair left.
    """
    assert sources, "a run needs a source"
    options = options or TokenOptions()
    workers = available_cores() if num_workers is None else num_workers
    stores = []
    for source in sources:
        found = open_source(source)
        store = tokenized_store(
            found,
            tokenizer,
            replace(options, format=source.format or options.format),
            cache=cache or _default_cache(),
            num_workers=workers,
            on_bad_row=on_bad_row,
        )
        stores.append((found, store))
    if on_bad_row == "skip" and bad_rows_file is not None:
        _list_bad_rows(stores, bad_rows_file)
    for found, store in stores:
        _check_not_empty(found, store)
    return PairDataset(stores, _weighted_order(stores, seed))


def _weighted_order(
    stores: Sequence[tuple[OpenSource, PairStore]], seed: int
) -> NDArray[np.int64] | None:
    """Indices into all stores' pairs as the weights want them; None where all are 1."""
    if all(found.source.weight == 1 for found, _ in stores):
        return None
    pieces, start = [], 0
    for number, (found, store) in enumerate(stores):
        weight, size = found.source.weight, store.num_pairs
        every_N = np.arange(start, start + size)
        pieces += [every_N] * int(weight)
        sampled = round((weight - int(weight)) * size)
        if sampled:
            locations = stream_pairs(0, sampled, num_pairs=size, seed=seed + number)
            pieces.append(start + np.sort(locations))
        elif weight < 1:
            message = f"weight {weight} leaves none of its {size} pairs"
            raise DataError.at(found.source.path, message, f"give it at least {1 / size:.2g}")
        start += size
    return np.concatenate(pieces)


def _check_not_empty(found: OpenSource, store: PairStore) -> None:
    if store.num_pairs:
        return
    reasons = Counter(bad.reason for bad in store.bad_rows()) + Counter(store.report.dropped_pairs)
    message = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    raise DataError.at(
        found.source.path,
        f"none of its {store.report.rows} rows is left: {message}",
        "check data.max_length, data.truncation and the rows themselves",
    )


def _list_bad_rows(stores: Sequence[tuple[OpenSource, PairStore]], path: Path) -> None:
    """Writes the list of skipped rows; by a rename, as several ranks may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    growing = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    # A file's name may not be UTF-8: then JSON's own escapes stand for it.
    with growing.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for found, store in stores:
            for bad in store.bad_rows():
                name = found.parts[bad.part].name
                message = {"file": name, "row": bad.row, "reason": bad.reason}
                file.write(json.dumps(message, ensure_ascii=False) + "\n")
    os.replace(growing, path)


def _default_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "megatron_idpo"
