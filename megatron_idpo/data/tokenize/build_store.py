"""Build the token store of a source: once, in parallel, in order.

The store's directory is named by a digest of everything that affects its contents: the bytes of the
source's files, the tokenizer with its chat template, the options, the version of Transformers. A
second run, and every rank but the first, only opens it. Ranks that share a file system wait for
each other at a file lock; a store appears by a rename, so an incomplete one is never visible.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from megatron_idpo.data.report import DataReport
from megatron_idpo.data.sources.open import OpenSource
from megatron_idpo.data.sources.preferences import parse_preference
from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.sources.record import BadRecord
from megatron_idpo.data.tokenize.chat import (
    DroppedPair,
    TokenOptions,
    TokenPair,
    encode_pairs,
    truncate,
)
from megatron_idpo.data.tokenize.rendering import PairText, pair_text
from megatron_idpo.data.tokenize.store import (
    COLUMNS,
    BadRow,
    PairStore,
    PairStoreWriter,
    TokenBatch,
    arrow_schema,
)
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import DataError, Problem
from megatron_idpo.storage.atomic import discard_directory, incomplete_directory, leftovers
from megatron_idpo.storage.lock import locked

type OnBadRow = Literal["error", "skip"]

type Rows = tuple[int, list[RawRow]]
"""The index of a part, and some of its rows."""

_STORE_FORMAT = 6
"""Incremented whenever the same rows would become other tokens or notes, or the file format
changes."""

_BATCH_ROWS = 512
_BATCHES_BEFORE_WORKERS = 6
"""Starting workers takes about as long as tokenizing this many batches."""

_BATCHES_PER_WORKER = 3
"""Batches in flight: bounds memory while the reader is faster than the workers."""

_ABANDONED_S = 24 * 3600.0
"""A build on another machine that has written nothing for so long was killed."""

_MAX_PROBLEMS = 10
_MAX_LOCATIONS = 2


def tokenized_store(
    source: OpenSource,
    tokenizer: Tokenizer,
    options: TokenOptions,
    *,
    cache: Path,
    num_workers: int = 1,
    on_bad_row: OnBadRow = "error",
) -> PairStore:
    """Open the store of a source; build it first if it does not exist.

    Raises:
        DataError: a bad row under `on_bad_row: error`, a file that cannot be read, or a cache that
            cannot be written.
    """
    name = _store_name(source, tokenizer, options)
    directory = cache / name
    with ExitStack() as stack:
        with _cache_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(cache / f"{name}.lock", wait=True))
        if not (directory / "meta.json").exists():
            tokenize = partial(tokenize_rows, tokenizer, options)
            _build(source, tokenize, directory, num_workers, on_bad_row)
    store = PairStore(directory)
    if on_bad_row == "error" and store.report.skipped_rows:
        _raise_bad_rows(source, islice(store.bad_rows(), _MAX_PROBLEMS))
    return store


def tokenize_rows(tokenizer: Tokenizer, options: TokenOptions, rows: Rows) -> TokenBatch:
    """Tokenize some rows of one part; bad ones become `BadRow`s and never raise."""
    part, raw_rows = rows
    bad: list[BadRow] = []
    parsed: list[tuple[RawRow, PairText]] = []
    has_template = tokenizer.has_chat_template
    for raw in raw_rows:
        try:
            preference = parse_preference(
                raw.record(), format=options.format, has_template=has_template
            )
            text = pair_text(preference, tokenizer, options.template_kwargs)
        except BadRecord as error:
            bad.append(BadRow(part, raw.row, error.reason, error.remedy))
            continue
        parsed.append((raw, text))
    report = DataReport(rows=len(raw_rows))
    kept: list[tuple[int, TokenPair]] = []
    encoded = encode_pairs([text for _, text in parsed], tokenizer)
    for (raw, _), pair in zip(parsed, encoded, strict=True):
        try:
            if isinstance(pair, BadRecord):
                raise pair
            truncated = truncate(pair, options.max_length, options.truncation)
        except BadRecord as error:
            bad.append(BadRow(part, raw.row, error.reason, error.remedy))
            continue
        if isinstance(truncated, DroppedPair):
            reason = truncated.reason
            report.dropped_pairs[reason] = report.dropped_pairs.get(reason, 0) + 1
            continue
        for kind, detail in {**raw.notes(), **truncated.notes}.items():
            report.note(kind, part, raw.row, detail)
        kept.append((raw.row, truncated))
    bad.sort(key=lambda row: row.row)
    report.skipped_rows = len(bad)
    return _token_batch(part, kept, tuple(bad), report)


def _token_batch(
    part: int, kept: list[tuple[int, TokenPair]], bad: tuple[BadRow, ...], report: DataReport
) -> TokenBatch:
    """Convert lists of tokens to a record batch, and count them in the report."""
    import pyarrow as pa

    pairs = [pair for _, pair in kept]
    report.kept_pairs = len(pairs)
    report.truncated_pairs = sum(pair.truncated for pair in pairs)
    report.prompt_tokens = sum(len(pair.prompt) for pair in pairs)
    report.chosen_tokens = sum(len(pair.chosen) for pair in pairs)
    report.rejected_tokens = sum(len(pair.rejected) for pair in pairs)
    rows = [
        {name: getattr(pair, name) for name in COLUMNS} | {"part": part, "row": row}
        for row, pair in kept
    ]
    return TokenBatch(pa.RecordBatch.from_pylist(rows, arrow_schema()), bad, report)


def _build(
    source: OpenSource,
    tokenize: Callable[[Rows], TokenBatch],
    directory: Path,
    num_workers: int,
    on_bad_row: OnBadRow,
) -> None:
    """Tokenize all rows into `directory`.

    Raises:
        DataError: see `tokenized_store`.
    """
    cache = directory.parent
    _clear_interrupted_builds(directory)
    # A unique name, although a lock is held: some file systems' locks do not reach other machines.
    incomplete = incomplete_directory(directory, f"{_host()}-{uuid.uuid4().hex}")
    batches = ordered_map(
        tokenize,
        _batch_rows(source),
        num_workers=num_workers,
        first_in_process=_BATCHES_BEFORE_WORKERS,
    )
    try:
        with _cache_errors(cache):
            incomplete.mkdir()
            writer = PairStoreWriter(incomplete, directory.name)
        with closing(writer), closing(batches):
            for batch in batches:
                if batch.bad_rows and on_bad_row == "error":
                    _raise_bad_rows(source, batch.bad_rows[:_MAX_PROBLEMS])
                with _cache_errors(cache):
                    writer.append(batch)
            with _cache_errors(cache):
                writer.finish()
                if directory.exists():  # Without meta.json, so not a finished store.
                    shutil.rmtree(directory)
                os.rename(incomplete, directory)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _clear_interrupted_builds(directory: Path) -> None:
    """Delete what builds of this store have left that were killed. The lock is held.

    No other process of this machine is building it. On another machine one may be, where locks do
    not reach: it writes all the time, so what has not changed for a day is left over.
    """
    for path in leftovers(directory):
        with suppress(OSError):  # deleted by another machine meanwhile
            age_s = time.time() - max(file.stat().st_mtime for file in (path, *path.iterdir()))
            if f"-{_host()}-" in path.name or age_s > _ABANDONED_S:
                discard_directory(path)


def _host() -> str:
    """Name of this machine, for a file's name."""
    return "".join(char if char.isalnum() else "_" for char in socket.gethostname())


def _cache_errors(cache: Path) -> AbstractContextManager[None]:
    """Turns an `OSError` of writing the cache, but not of reading sources, into a `DataError`."""
    message = f"{cache} cannot be written"
    remedy = "name another directory"
    return DataError.on_os_error("data.cache", message, remedy)


def _batch_rows(source: OpenSource) -> Iterator[Rows]:
    """The rows of all parts in batches; an empty part yields a bad row 0."""
    for index, part in enumerate(source.parts):
        rows = part.read()
        first = list(islice(rows, _BATCH_ROWS))
        yield index, first or [RawRow(0, BadRecord("is empty: it has no records"))]
        while batch := list(islice(rows, _BATCH_ROWS)):
            yield index, batch


def _raise_bad_rows(source: OpenSource, bad_rows: Iterable[BadRow]) -> None:
    """Raise each distinct problem once: a missing chat template, say, affects every row.

    Only the first locations are named. Their total is unknown, since reading stops here.
    """
    locations: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for bad in bad_rows:
        locations[bad.reason, bad.remedy].append(source.location(bad.part, bad.row))
    problems = []
    for (reason, remedy), rows in locations.items():
        more = " and more" if len(rows) > _MAX_LOCATIONS else ""
        problems.append(Problem(", ".join(rows[:_MAX_LOCATIONS]) + more, reason, remedy))
    raise DataError.of(problems)


def _store_name(source: OpenSource, tokenizer: Tokenizer, options: TokenOptions) -> str:
    import transformers

    inputs = {
        "store": _STORE_FORMAT,
        "contents": source.digest(),
        "tokenizer": tokenizer.identity,
        "options": asdict(options),
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


_worker_function: Any = None  # Set in worker processes only, by their initializer.


def ordered_map[Item, Result](
    function: Callable[[Item], Result],
    items: Iterator[Item],
    *,
    num_workers: int,
    first_in_process: int,
) -> Generator[Result]:
    """Yield `function(item)` for each item, in order, from worker processes.

    `ProcessPoolExecutor.map` reads all of its input at once, so memory grows with it; here a
    bounded number of items is in flight. Workers are spawned, since forking a process that has CUDA
    or communication threads is not safe. That takes seconds: the first items are processed here,
    and a small input starts no workers.

    Args:
        function: picklable; sent to each worker once.
        items: picklable; read lazily.
        num_workers: below 2, everything is processed in this process.
        first_in_process: number of items to process here before workers are started.
    """
    yield from map(function, items if num_workers < 2 else islice(items, first_in_process))
    following = next(items, None)
    if following is None:
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (function,))
    try:
        window: deque[Future[Result]] = deque()
        for item in chain([following], items):
            if len(window) >= _BATCHES_PER_WORKER * num_workers:
                yield window.popleft().result()
            window.append(pool.submit(_run_worker_function, item))
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    # The processes already share the cores: one tokenizer thread each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_function = function


def _end_with_parent() -> None:
    """End this process when its parent has ended, also if that was killed.

    A worker waits for items in a pipe that the other workers have open too, so it would never read
    its end.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_worker_function(item: Any) -> Any:
    return _worker_function(item)
