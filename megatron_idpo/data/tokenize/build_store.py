"""A source's rows become a store of tokenised pairs: once, in parallel, in order.

The store's directory is named by a fingerprint of everything that decides its contents: the bytes
of the source's files, the tokenizer with its chat template, the options, the version of
Transformers. So a second run, and every rank but the first, only opens it. Ranks that share a file
system wait for each other at a file lock; a store appears by a rename, so none is ever seen
half-written.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_idpo.data.report import DataReport
from megatron_idpo.data.sources.open import OpenSource
from megatron_idpo.data.sources.preferences import Preference, parse_preference
from megatron_idpo.data.sources.raw_record import BadRecord
from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.tokenize.chat import (
    Dropped,
    PairText,
    TokenOptions,
    TokenPair,
    encode_pairs,
    pair_text,
    truncate,
)
from megatron_idpo.data.tokenize.process_map import ordered_map
from megatron_idpo.data.tokenize.store import BadRow, PairStore, PairStoreWriter, TokenBatch
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import DataError, Problem
from megatron_idpo.storage.lock import locked

type OnBadRow = Literal["error", "skip"]

_STORE_FORMAT = 2
"""Raised whenever the same rows would become other tokens, or the files another shape."""

_BATCH_ROWS = 512
_BATCHES_BEFORE_WORKERS = 6
"""Starting workers costs about as long as tokenising this many batches."""

_PROBLEMS_TOLD = 10
_ROWS_TOLD = 2


@dataclass(frozen=True)
class Job:
    """What a worker needs beside the rows."""

    tokenizer: Tokenizer
    options: TokenOptions


def tokenized_store(
    found: OpenSource,
    tokenizer: Tokenizer,
    options: TokenOptions,
    *,
    cache: Path,
    num_workers: int = 1,
    on_bad_row: OnBadRow = "error",
) -> PairStore:
    """The store of a source, made if it is not there yet.

    Raises:
        DataError: a bad row under `on_bad_row: error`, a file that cannot be read, or a cache that
            cannot be written.
    """
    name = _fingerprint(found, tokenizer, options)
    directory = cache / name
    with ExitStack() as hold:
        with _writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            hold.enter_context(locked(cache / f"{name}.lock", wait=True))
        if not (directory / "meta.json").exists():
            _build(found, Job(tokenizer, options), directory, num_workers, on_bad_row)
    store = PairStore(directory)
    if on_bad_row == "error" and store.report.skipped_rows:
        _refuse(found, list(islice(store.bad_rows(), _PROBLEMS_TOLD)))
    return store


def tokenize_rows(job: Job, unit: tuple[int, list[RawRow]]) -> TokenBatch:
    """Tokenises some rows of one part; bad ones become `BadRow`s and never an exception."""
    part, rows = unit
    bad: list[BadRow] = []
    read: list[tuple[RawRow, PairText, Preference]] = []
    for raw in rows:
        try:
            preference = parse_preference(
                raw.record(),
                format=job.options.format,
                has_template=job.tokenizer.has_chat_template,
            )
            text = pair_text(preference, job.tokenizer, job.options.template_kwargs)
        except BadRecord as error:
            bad.append(BadRow(part, raw.row, error.reason, error.remedy))
            continue
        read.append((raw, text, preference))
    report = DataReport(rows=len(rows))
    kept: list[tuple[int, TokenPair]] = []
    encoded = encode_pairs([text for _, text, _ in read], job.tokenizer)
    is_auto = job.options.format == "auto" and job.tokenizer.has_chat_template
    for (raw, _, preference), pair in zip(read, encoded, strict=True):
        try:
            if isinstance(pair, BadRecord):
                raise pair
            cut = truncate(pair, job.options.max_length, job.options.truncation)
        except BadRecord as error:
            bad.append(BadRow(part, raw.row, error.reason, error.remedy))
            continue
        if isinstance(cut, Dropped):
            report.dropped_pairs[cut.reason] = report.dropped_pairs.get(cut.reason, 0) + 1
            continue
        report.longer_answers += _has_longer_answer(preference)
        report.untemplated_pairs += is_auto and not preference.is_chat
        kept.append((raw.row, cut))
    bad.sort(key=lambda row: row.row)
    report.skipped_rows = len(bad)
    return _batch(part, kept, tuple(bad), report)


def _has_longer_answer(preference: Preference) -> bool:
    """Whether an answer has several messages."""
    return preference.is_chat and max(len(preference.chosen), len(preference.rejected)) > 1


def _batch(
    part: int, kept: list[tuple[int, TokenPair]], bad: tuple[BadRow, ...], report: DataReport
) -> TokenBatch:
    """Lists of tokens as flat arrays, and their counts in the report."""
    pairs = [pair for _, pair in kept]
    lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    lengths_B3 = np.array(lengths, np.int32).reshape(-1, 3)
    report.kept_pairs = len(pairs)
    report.truncated_pairs = sum(pair.truncated for pair in pairs)
    report.moved_boundaries = sum(pair.moved for pair in pairs)
    report.unterminated_pairs = sum(pair.unterminated for pair in pairs)
    sums = lengths_B3.sum(axis=0, dtype=np.int64).tolist()
    report.prompt_tokens, report.chosen_tokens, report.rejected_tokens = sums
    prompts, chosen, rejected = (
        np.fromiter(chain.from_iterable(column), np.int32)
        for column in (
            (pair.prompt for pair in pairs),
            (pair.chosen for pair in pairs),
            (pair.rejected for pair in pairs),
        )
    )
    rows_B = np.array([row for row, _ in kept], np.int64)
    return TokenBatch(part, rows_B, lengths_B3, (prompts, chosen, rejected), bad, report)


def _build(
    found: OpenSource, job: Job, directory: Path, num_workers: int, on_bad_row: OnBadRow
) -> None:
    """Tokenise all rows.

    Raises:
        DataError: see `tokenized_store`.
    """
    cache = directory.parent
    # A name of its own: there are file systems whose locks end at the machine.
    growing = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
    batches = ordered_map(
        tokenize_rows,
        job,
        _units(found),
        num_workers=num_workers,
        first_here=_BATCHES_BEFORE_WORKERS,
    )
    try:
        with _writing(cache):
            growing.mkdir()
            writer = PairStoreWriter(growing)
        try:
            for batch in batches:
                if batch.bad_rows and on_bad_row == "error":
                    _refuse(found, list(batch.bad_rows[:_PROBLEMS_TOLD]))
                with _writing(cache):
                    writer.append(batch)
        finally:
            with _writing(cache):
                writer.close()
        with _writing(cache):
            writer.finish()
            if directory.exists():  # Without meta.json: nothing that we wrote.
                shutil.rmtree(directory)
            os.rename(growing, directory)
    finally:
        batches.close()
        shutil.rmtree(growing, ignore_errors=True)


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Around what writes the cache, and nothing else: what is read fails for reasons of its own.

    Raises:
        DataError: the system refuses.
    """
    try:
        yield
    except OSError as error:
        message = f"{cache} cannot be written: {error.strerror or error}"
        remedy = "free space, or name a directory on another file system"
        raise DataError.at("data.cache", message, remedy) from None


def _units(found: OpenSource) -> Iterator[tuple[int, list[RawRow]]]:
    """The rows of all parts, some at a time; an empty part shows as a bad row 0."""
    for number, part in enumerate(found.parts):
        rows = part.read()
        empty = True
        while some := list(islice(rows, _BATCH_ROWS)):
            empty = False
            yield number, some
        if empty:
            yield number, [RawRow(0, BadRecord("is empty: it has no records"))]


def _refuse(found: OpenSource, bad_rows: list[BadRow]) -> None:
    """Stop, with each mistake told once: a missing chat template is one, not one for every row."""
    locations: dict[tuple[str, str], list[str]] = {}
    for bad in bad_rows:
        mistake = (bad.reason, bad.remedy)
        locations.setdefault(mistake, []).append(location(found, bad.part, bad.row))
    raise DataError.of(
        [
            Problem(_format_places(rows), reason, remedy)
            for (reason, remedy), rows in locations.items()
        ]
    )


def _format_places(rows: list[str]) -> str:
    """The first rows with a mistake; how many there are of it is not known where reading stops."""
    return f"{', '.join(rows[:_ROWS_TOLD])}{' and more' if len(rows) > _ROWS_TOLD else ''}"


def location(found: OpenSource, part: int, row: int) -> str:
    """How a row is called: `file:row`, or the file alone for row 0."""
    name = found.parts[part].name
    return f"{name}:{row}" if row else name


def _fingerprint(found: OpenSource, tokenizer: Tokenizer, options: TokenOptions) -> str:
    import transformers

    decisive = {
        "store": _STORE_FORMAT,
        "contents": found.digest(),
        "tokenizer": tokenizer.identity,
        "options": asdict(options),
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
