"""Rows of one data file, one after the other, each with the number a user can look up.

Row numbers count from 1: the line of a `.jsonl` or `.csv` file (where the record begins), the
element of a `.json` list, the row of a table. JSON lines are read here and not by `datasets`, whose
reader names no row, turns missing fields into nulls and refuses or converts columns of mixed types.
Every reader streams: memory does not grow with the file. Records are judged in `preferences.py`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_idpo.data.sources.columns import AS_OURS, Columns, columns_read, renamed
from megatron_idpo.data.sources.raw_record import BadRecord
from megatron_idpo.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""What can be read; `.jsonl`, `.json` and `.csv` also with `.gz` behind."""

_CHUNK_CHARS = 1 << 20
_TABLE_ROWS = 256
_WHITE = " \t\r\n"
_NO_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are not UTF-8."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before it is understood."""

    row: int
    """1-based; 0 where no row can be named."""

    content: bytes | Mapping[str, Any] | BadRecord
    """A JSON text, a parsed record, or why there is none."""

    columns: Columns = field(default_factory=lambda: AS_OURS)
    """What the record's fields stand for."""

    def record(self) -> object:
        """The parsed record, with our names and only what is read of it.

        Raises:
            BadRecord: it is not UTF-8, not JSON, or could not be read in the first place; or a
                column that was named is not there.
        """
        if isinstance(self.content, BadRecord):
            raise self.content
        content = _parse(self.content) if isinstance(self.content, bytes) else self.content
        return renamed(content, self.columns)


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read: one of `SUFFIXES`, or another that cannot be."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_file(path: Path, columns: Columns = AS_OURS) -> Iterator[RawRow]:
    """The rows of one local file, by its suffix.

    Args:
        path: of the file.
        columns: which of its columns stand for what.

    Raises:
        DataError: the suffix is unknown, or the file is damaged or may not be read.
    """
    kind = file_kind(path)
    readers: dict[str, Callable[[Path], Iterator[RawRow]]] = {
        ".jsonl": _read_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": partial(_read_parquet, columns=columns),
        ".arrow": partial(_read_arrow, columns=columns),
    }
    if kind not in readers:
        known = " ".join(SUFFIXES)
        raise DataError.at(str(path), f"cannot read a '{path.suffix}' file", f"known are {known}")
    try:
        for raw in readers[kind](path):
            yield replace(raw, columns=columns)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError.at(str(path), f"the file cannot be read: {error}") from None


def read_dataset(dataset: Any, columns: Columns = AS_OURS) -> Iterator[RawRow]:
    """The rows of a memory-mapped `datasets.Dataset`; only the columns that matter are decoded."""
    names = columns_read(columns, dataset.column_names)
    if not names:  # Then batches would show no rows at all.
        yield from (RawRow(row, {}, columns) for row in range(1, len(dataset) + 1))
    row = 0
    for batch in dataset.select_columns(names).with_format(None).iter(_TABLE_ROWS):
        for values in zip(*batch.values(), strict=True):
            row += 1
            yield RawRow(row, _without_nulls(dict(zip(batch, values, strict=True))), columns)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parse(text: bytes) -> object:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start + 1} of the row") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None


def _read_lines(path: Path) -> Iterator[RawRow]:
    with _open(path) as file:
        for row, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
            if text.strip():
                yield RawRow(row, text)


def _read_json(path: Path) -> Iterator[RawRow]:
    """A list of records; a file that begins with anything else is read as JSON lines."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_lines(path)
        return
    yield from _read_list(path)


def _read_list(path: Path) -> Iterator[RawRow]:
    """The elements of a JSON list, decoded one by one from a sliding window of the text.

    Where an element is broken, nobody knows where the next one begins. That is no bad row that
    could be skipped: the rest of the file would go with it.
    """
    decoder = json.JSONDecoder()
    with _open(path) as raw:
        file = _text(raw)
        text, at, row, ended = file.read(_CHUNK_CHARS).lstrip(_WHITE)[1:], 0, 0, False
        while True:
            at = _skip_white(text, at)
            if text[at : at + 1] == "]":
                return
            try:
                record, end = decoder.raw_decode(text, at)
                after = _skip_white(text, end)
                if text[after : after + 1] not in (",", "]"):
                    raise ValueError("no ',' or ']' after the element")
            except (ValueError, RecursionError) as error:
                # An element may only be incomplete: widen the window before judging it.
                more = "" if ended else file.read(max(_CHUNK_CHARS, len(text) - at))
                if more:
                    text, at = text[at:] + more, 0
                    continue
                if not ended:
                    ended = True
                    continue
                raise DataError.at(
                    f"{path}:{row + 1}",
                    f"not JSON: {getattr(error, 'msg', error)}, so the rest cannot be read either",
                    "correct the file, or write one record per line into a .jsonl file",
                ) from None
            row += 1
            yield RawRow(row, _element(record, text[at:end]))
            at = after + (text[after] == ",")


def _element(record: object, text: str) -> dict[str, Any] | BadRecord:
    if _NO_UTF8.search(text):
        return BadRecord("invalid UTF-8")
    if isinstance(record, dict):
        return record
    return BadRecord(f"the record is {record!r:.40}, not an object with fields")


def _text(raw: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """Text whose bytes that are not UTF-8 become `_NO_UTF8`, so that they are told by their row."""
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _skip_white(text: str, at: int) -> int:
    while at < len(text) and text[at] in _WHITE:
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # A long prompt is no mistake; the module's limit is 128 KiB.
    with _open(path) as raw:
        reader = csv.reader(_text(raw, newline=""), strict=True)
        header: list[str] | None = None
        while True:
            row = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(row, BadRecord(f"not CSV: {error}{_until(row, reader.line_num)}"))
                continue
            if header is None:
                header = fields
            elif fields:
                yield RawRow(row, _csv_record(header, fields, _until(row, reader.line_num)))


def _until(first: int, last: int) -> str:
    """What a bad record takes with it: an open quote swallows the lines up to the next one."""
    return f", in lines {first} to {last}" if last > first else ""


def _csv_record(header: list[str], fields: list[str], until: str) -> dict[str, str] | BadRecord:
    if len(fields) != len(header):
        return BadRecord(
            f"{len(fields)} fields, but the header has {len(header)}{until}",
            "quote fields that contain commas or line breaks",
        )
    if any(map(_NO_UTF8.search, fields)):
        return BadRecord("invalid UTF-8")
    return dict(zip(header, fields, strict=True))


def _read_parquet(path: Path, *, columns: Columns) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = columns_read(columns, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(_TABLE_ROWS, columns=names):
                for record in batch.to_pylist():
                    row += 1
                    yield RawRow(row, _without_nulls(record))
    except pa.ArrowException as error:
        raise DataError.at(str(path), f"the parquet file cannot be read: {error}") from None


def _read_arrow(path: Path, *, columns: Columns) -> Iterator[RawRow]:
    """An Arrow stream, as `datasets` writes it, or an Arrow file; memory-mapped."""
    import datasets
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            if is_file:
                table = pa.ipc.open_file(path).read_all()
        dataset = datasets.Dataset(table) if is_file else datasets.Dataset.from_file(str(path))
        yield from read_dataset(dataset, columns)
    except pa.ArrowException as error:
        raise DataError.at(str(path), f"the Arrow file cannot be read: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct every field, null where a record had none: take those out again."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
