"""Read the rows of one data file in order, each with the row number that a user can look up.

Row numbers start at 1: the line of a `.jsonl` or `.csv` file (where the record begins), the element
of a `.json` list, the row of a table. JSON lines are not read by `datasets`, whose reader has no
row numbers, turns missing fields into nulls and refuses or converts columns of mixed types. Every
reader streams: memory does not grow with the file. `text_file.py` decompresses and decodes text
files. `preferences.py` validates records.
"""

import csv
import io
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from megatron_idpo.data.sources.record import (
    STANDARD_COLUMNS,
    BadRecord,
    Columns,
    JsonDecoder,
    needed_columns,
    parse_json,
    rename_columns,
)
from megatron_idpo.data.sources.text_file import COMPRESSIONS, open_utf8
from megatron_idpo.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
SUFFIXES = (*TEXT_SUFFIXES, *_TABLES)
"""The supported files, in any case; text also with a suffix of `COMPRESSIONS` appended."""

SUPPORTED = f"{' '.join(SUFFIXES)}, and text also with {' '.join(COMPRESSIONS)}"
"""The supported files, for messages."""

type Content = bytes | Mapping[str, Any] | BadRecord
"""A JSON text, a parsed record, or why there is none."""

type Rows = Iterator[tuple[int, Content]]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK_CHARS = 1 << 20
_TABLE_ROWS = 256
_WHITE = " \t\r\n"
_OTHER_KIND = "save it as parquet or as JSON lines"

_TOOL_FIELDS = ("arguments", "tools", "chat_template_kwargs")
"""Fields whose content is the user's own, so that a null inside may have a meaning."""

_INVALID_UTF8 = re.compile("[\udc80-\udcff]")
"""The surrogates that `surrogateescape` substitutes for bytes that are not UTF-8."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before it is parsed."""

    row: int
    """1-based; 0 if no row can be named."""

    content: Content
    columns: Columns = field(default_factory=dict)
    """The mapping of the record's columns."""

    is_of_table: bool = False
    """Whether its null fields may stand for missing ones."""

    def record(self) -> object:
        """The parsed record, with our field names and without other columns.

        Raises:
            BadRecord: it is not UTF-8, not JSON, or could not be read in the first place; or a
                mapped column is missing.
        """
        if isinstance(self.content, BadRecord):
            raise self.content
        content: object = self.content
        if isinstance(content, bytes):
            content = parse_json(content)
        elif self.is_of_table:
            content = _without_nulls(content)
        return rename_columns(content, self.columns)

    def notes(self) -> dict[str, str]:
        """What reading the row has changed: kind of note (`data/report.py`) -> what was found."""
        if not self.is_of_table:
            return {}
        named = {self.columns.get(name, name) for name in _TOOL_FIELDS}
        null = next(_nulls_in(self.content, {*_TOOL_FIELDS, *named}), None)
        return {} if null is None else {"nulls": f"'{null}' is null"}


def file_kind(path: Path) -> str:
    """The suffix that selects the reader, without that of a compression; may be unsupported.

    `.ndjson` is another name of `.jsonl`.
    """
    suffix = (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()
    return ".jsonl" if suffix == ".ndjson" else suffix


def is_supported(path: Path) -> bool:
    """Whether there is a reader for files of this name."""
    return file_kind(path) in SUFFIXES


def read_file(path: Path, columns: Columns = STANDARD_COLUMNS) -> Iterator[RawRow]:
    """The rows of one local file; the reader is selected by its suffix.

    A file of 0 bytes, as an empty shard, has no rows; a warning names it.

    Args:
        path: of the file.
        columns: the mapping of its columns.

    Raises:
        DataError: the suffix is unknown, or the file is damaged or not readable.
    """
    readers: dict[str, Callable[[Path, Columns], Rows]] = {
        ".jsonl": _read_lines,
        ".json": _read_json,
        ".csv": partial(_read_csv, delimiter=","),
        ".tsv": partial(_read_csv, delimiter="\t"),
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
    }
    kind = file_kind(path)
    reader = readers.get(kind)
    if reader is None:
        message = f"cannot read a '{path.suffix}' file"
        raise DataError.at(str(path), message, f"supported are {SUPPORTED}")
    if kind not in TEXT_SUFFIXES and path.suffix.lower() in COMPRESSIONS:
        message = f"cannot read a '{kind}' file that is compressed as a whole"
        raise DataError.at(str(path), message, "decompress it")
    import pyarrow as pa

    try:
        if _is_empty(path):
            return
        for row, content in reader(path, columns):
            yield RawRow(row, content, columns, is_of_table=kind in _TABLES)
    except UnicodeDecodeError as error:
        message = f"not valid {error.encoding}: {error.reason}, so the rest cannot be read either"
        raise DataError.at(str(path), message, "save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError.at(str(path), f"the file cannot be read: {error}") from None


def _is_empty(path: Path) -> bool:
    """Whether a file has no bytes.

    Raises:
        DataError: it is the pointer that Git leaves in place of a large file.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        message = "is a Git LFS pointer: the file itself was not downloaded"
        raise DataError.at(str(path), message, "run `git lfs pull` in its directory")
    if not start:
        logger.warning("%s is empty (0 bytes): it has no rows", path)
    return not start


def read_dataset(dataset: Any, columns: Columns = STANDARD_COLUMNS) -> Iterator[RawRow]:
    """The rows of a memory-mapped `datasets.Dataset`; only the needed columns are decoded."""
    for row, content in _dataset_rows(dataset, columns):
        yield RawRow(row, content, columns, is_of_table=True)


def _dataset_rows(dataset: Any, columns: Columns) -> Rows:
    names = needed_columns(columns, dataset.features.arrow_schema)
    if not names:  # Batches without columns would have no rows.
        yield from ((row, {}) for row in range(1, len(dataset) + 1))
    records = (
        dict(zip(batch, values, strict=True))
        for batch in dataset.select_columns(names).with_format(None).iter(_TABLE_ROWS)
        for values in zip(*batch.values(), strict=True)
    )
    yield from enumerate(records, 1)


def _read_lines(path: Path, _: Columns) -> Rows:
    with open_utf8(path) as file:
        for row, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
            if text.strip():
                yield row, text


def _read_json(path: Path, columns: Columns) -> Rows:
    """A list of records; a file that begins with anything else is read as JSON lines."""
    with open_utf8(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _read_list(path) if start.startswith(b"[") else _read_lines(path, columns)


def _read_list(path: Path) -> Rows:
    """The elements of a JSON list, decoded one by one from a sliding window of the text.

    The start of the next element after an invalid one is unknown. It is therefore an error and not
    a bad row that may be skipped: the rest of the file would be lost with it.
    """
    decoder = JsonDecoder()
    with open_utf8(path) as raw:
        file = _text(raw)
        text, at, row = file.read(_CHUNK_CHARS).lstrip(_WHITE)[1:], 0, 0
        while True:
            at = _skip_white(text, at)
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip(_WHITE) or file.read().strip(_WHITE):
                    message = "text follows the end of the list, and would not be read"
                    remedy = "write one list, or one record per line into a .jsonl file"
                    raise DataError.at(str(path), message, remedy)
                return
            decoder.doubled = []
            try:
                record, end = decoder.raw_decode(text, at)
                after = _skip_white(text, end)
                if text[after : after + 1] not in (",", "]"):
                    raise ValueError("no ',' or ']' after the element")
            except (ValueError, RecursionError) as error:
                # The element may only be incomplete: enlarge the window before refusing it.
                more = file.read(max(_CHUNK_CHARS, len(text) - at))
                if more:
                    text, at = text[at:] + more, 0
                    continue
                raise DataError.at(
                    f"{path}:{row + 1}",
                    f"not JSON: {getattr(error, 'msg', error)}, so the rest cannot be read either",
                    "correct the file, or write one record per line into a .jsonl file",
                ) from None
            row += 1
            yield row, _element(record, text[at:end], decoder)
            at = after + (text[after] == ",")


def _element(record: object, text: str, decoder: JsonDecoder) -> dict[str, Any] | BadRecord:
    if _INVALID_UTF8.search(text):
        return BadRecord("invalid UTF-8")
    try:
        decoder.check()
    except BadRecord as error:
        return error
    if isinstance(record, dict):
        return record
    return BadRecord(f"the record is {record!r:.40}, not an object with fields")


def _text(raw: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """Text in which invalid UTF-8 becomes surrogates, so that it can be reported by row."""
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _skip_white(text: str, at: int) -> int:
    while at < len(text) and text[at] in _WHITE:
        at += 1
    return at


def _read_csv(path: Path, _: Columns, *, delimiter: str) -> Rows:
    csv.field_size_limit(2**31 - 1)  # The module's limit is 128 KiB, less than a long prompt.
    with open_utf8(path) as raw:
        reader = csv.reader(_text(raw, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            row = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield row, BadRecord(f"not CSV: {error}{_line_range(row, reader.line_num)}")
                continue
            if header is None:
                header = fields
                _check_columns(path, header)
            elif fields:
                yield row, _csv_record(header, fields, _line_range(row, reader.line_num))


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a table that has a column twice: the last one would win.

    Raises:
        DataError: it does.
    """
    if doubled := [name for name in names if names.count(name) > 1]:
        message = f"has the column '{doubled[0]}' twice"
        raise DataError.at(str(path), message, "remove or rename one of the two")


def _line_range(first: int, last: int) -> str:
    """The lines of a bad record: an unclosed quote extends to the next quote."""
    return f", in lines {first} to {last}" if last > first else ""


def _csv_record(header: list[str], fields: list[str], lines: str) -> dict[str, str] | BadRecord:
    if len(fields) != len(header):
        return BadRecord(
            f"{len(fields)} fields, but the header has {len(header)}{lines}",
            "quote fields that contain the separator or line breaks",
        )
    if any(map(_INVALID_UTF8.search, fields)):
        return BadRecord("invalid UTF-8")
    return dict(zip(header, fields, strict=True))


def _read_parquet(path: Path, columns: Columns) -> Rows:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names)
        names = needed_columns(columns, file.schema_arrow)
        batches = file.iter_batches(_TABLE_ROWS, columns=names)
        records = chain.from_iterable(map(_records, batches))
        yield from enumerate(records, 1)


def _records(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch; maps become mappings like structs."""
    import pyarrow as pa

    try:
        return _valid(batch).to_pylist(maps_as_pydicts="strict")  # type: ignore[no-any-return]
    except KeyError as error:
        raise pa.ArrowInvalid(f"a map has a key twice: {error}") from None


def _valid(table: Any) -> Any:
    """The table or batch, if its offsets and texts are valid: `to_pylist` does not check them."""
    table.validate(full=True)
    return table


def _read_arrow(path: Path, columns: Columns) -> Rows:
    """An Arrow stream, as `datasets` writes it, or an Arrow file; memory-mapped."""
    import datasets
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        open_table = pa.ipc.open_file if is_file else pa.ipc.open_stream
        mapped.seek(0)
        # Before `datasets` sees it: with invalid offsets it reads beyond the file, and crashes.
        table = _valid(open_table(mapped).read_all())
        _check_columns(path, table.column_names)
    try:
        dataset = datasets.Dataset(table) if is_file else datasets.Dataset.from_file(str(path))
    except ValueError as error:  # `datasets` does not know all of Arrow's types
        raise DataError.at(str(path), f"the file cannot be read: {error}", _OTHER_KIND) from None
    yield from _dataset_rows(dataset, columns)


def _without_nulls(value: Any) -> Any:
    """The value without null fields: Arrow adds one to every struct that lacks a field."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _nulls_in(value: object, names: Container[str], *, is_inside: bool = False) -> Iterator[str]:
    """The null fields inside fields with one of these names, at any depth."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if part is None and is_inside:
                yield name
            yield from _nulls_in(part, names, is_inside=is_inside or name in names)
    elif isinstance(value, list):
        for part in value:
            yield from _nulls_in(part, names, is_inside=is_inside)
