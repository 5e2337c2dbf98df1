"""Reading files: records with the row numbers that a user can look up."""

import bz2
import csv
import gzip
import io
import json
import lzma
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.data.sources import readers
from megatron_idpo.data.sources.readers import RawRow, read_dataset, read_file
from megatron_idpo.data.sources.record import FIELDS, BadRecord
from megatron_idpo.errors import DataError

RECORDS = [
    {"prompt": "é", "chosen": "a\nb", "rejected": 'c,"d"'},
    {"prompt": "漢 字", "chosen": "e", "rejected": "f"},
    {"prompt": "p", "chosen": "g", "rejected": "h"},
]


def rows_of(path: Path) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for raw in read_file(path):
        try:
            rows.append((raw.row, raw.record()))
        except BadRecord as error:
            rows.append((raw.row, error.reason))
    return rows


def write_text(path: Path, text: str) -> None:
    """Writes text in the encoding of the file's stem, compressed by its last suffix."""
    encoding = path.name.split(".")[0]
    content = text.encode(encoding if encoding.startswith("utf") else "utf-8")
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix.lower() == ".zst":
        content = bytes(pa.compress(content, "zstd"))
    path.write_bytes(compress.get(path.suffix.lower(), bytes)(content))


def write(path: Path, records: list[dict[str, str]]) -> list[int]:
    """Writes records in the format of the suffix; returns the rows they are at."""
    table = pa.Table.from_pylist(records)
    rows = list(range(1, len(records) + 1))
    match path.suffixes[0].lower():
        case ".jsonl" | ".ndjson":
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in records)
            write_text(path, text)
            return [2 * row - 1 for row in rows]
        case ".json":
            write_text(path, json.dumps(records, indent=2))
        case ".csv" | ".tsv":
            file = io.StringIO()
            dialect = csv.excel_tab if ".tsv" in path.name else csv.excel
            writer = csv.DictWriter(file, list(records[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(records)
            write_text(path, file.getvalue())
            return [2, 4, 5]  # The first record has a line break.
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            write_arrow(path, table)
    return rows


def write_arrow(path: Path, table: pa.Table) -> None:
    sink = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, sink(file, table.schema) as writer:
        writer.write_table(table)


NAMES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "stream.arrow", "file.arrow"]
NAMES += ["a.ndjson", "a.tsv", "A.JSONL", "A.Parquet", "a.jsonl.bz2", "a.csv.xz", "a.json.zst"]
NAMES += ["a.JSONL.GZ", "utf-16.jsonl", "utf-16.json", "utf-16.csv.gz", "utf-32.tsv"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_yields_records_with_row_numbers(name: str, tmp_path: Path) -> None:
    rows = write(tmp_path / name, RECORDS)
    assert rows_of(tmp_path / name) == list(zip(rows, RECORDS, strict=True))


def test_json_file_may_contain_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"chosen": 1}\n{"chosen": 2}')
    assert rows_of(tmp_path / "a.json") == [(1, {"chosen": 1}), (2, {"chosen": 2})]


def test_unreadable_lines_are_reported_by_row(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf{}", b"", b"{nope", b'"\xff"', b"[" * 100_000, b"{}"]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    message = dict(rows_of(tmp_path / "a.jsonl"))
    assert sorted(message) == [1, 3, 4, 5, 6] and message[1] == message[6] == {}
    assert message[3].startswith("not JSON: Expecting property name")
    assert message[4] == "invalid UTF-8 at byte 2 of the row"
    assert message[5].startswith("not JSON")


JSON = st.recursive(
    st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2), max_size=6)


@given(OBJECTS, st.sampled_from([None, 1]), st.integers(1, 9))
def test_json_list_is_read_with_any_window_size(
    tmp_path_factory: pytest.TempPathFactory, objects: Any, indent: int | None, window: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(
        json.dumps(objects, indent=indent, ensure_ascii=False), "utf-8", "surrogatepass"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK_CHARS", window)
        assert rows_of(path) == list(enumerate(objects, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ]', r"a\.json:2: not JSON: Expecting value, so the rest"),
        ('[{"a": 1} {"a": 2}, {}]', r"a\.json:1: not JSON: no ',' or ']' after the element, so"),
        ('[{"a": 1}, {"a": 2}', r"a\.json:2: not JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', r"a\.json: text follows the end of the list.*; write one"),
        ('[{"a": 1}]garbage', r"a\.json: text follows the end of the list"),
    ],
)
def test_truncated_json_list_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    """Skipping the element would lose every valid pair after it."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_file(tmp_path / "a.json"))


def test_bad_elements_of_a_json_list_are_reported_by_element(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{}, 5, {"chosen": "\xff"}, {"chosen": "\\udcff"}]')
    assert rows_of(tmp_path / "a.json") == [
        (1, {}),
        (2, "the record is 5, not an object with fields"),
        (3, "invalid UTF-8"),
        (4, {"chosen": "\udcff"}),
    ]


def test_invalid_csv_rows_are_reported_by_line(tmp_path: Path) -> None:
    lines = [b"prompt,chosen,rejected", b"p,a,b,c", b"p,a\xff,b", b"p,a,b", b'p,"a,b']
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    assert rows_of(tmp_path / "a.csv") == [
        (2, "4 fields, but the header has 3"),
        (3, "invalid UTF-8"),
        (4, {"prompt": "p", "chosen": "a", "rejected": "b"}),
        (5, "not CSV: unexpected end of data"),
    ]


def test_unclosed_csv_quote_is_reported_with_its_lines(tmp_path: Path) -> None:
    lines = ["prompt,chosen,rejected", 'p,"a,b', "q,a,b", '"r",a,b', "s,a,b", 't,"a', 'b",c,d,e']
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert rows_of(tmp_path / "a.csv") == [
        (2, "not CSV: ',' expected after '\"', in lines 2 to 4"),
        (5, {"prompt": "s", "chosen": "a", "rejected": "b"}),
        (6, "5 fields, but the header has 3, in lines 6 to 7"),
    ]


def test_dataset_without_needed_columns_still_has_rows() -> None:
    dataset = datasets.Dataset.from_list([{"x": 1}, {"x": 2}])
    assert [(raw.row, raw.record()) for raw in read_dataset(dataset)] == [(1, {}), (2, {})]


def test_nulls_added_by_arrow_are_removed(tmp_path: Path) -> None:
    tools = [{"a": {"x": 1}}, {"b": "y"}]
    datasets.Dataset.from_list([{"chosen": "c", "tools": tools, "extra": 1}]).to_parquet(
        tmp_path / "a.parquet"
    )
    assert rows_of(tmp_path / "a.parquet") == [(1, {"chosen": "c", "tools": tools})]


def calling(arguments: Any) -> dict[str, Any]:
    """A record whose answer calls a tool."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    prompt = [{"role": "user", "content": "q", "tool_calls": None}]
    return {"prompt": prompt, "chosen": [answer], "rejected": [{**answer, "content": "no"}]}


def arguments_of(raw: RawRow) -> Any:
    record: Any = raw.record()
    return record["chosen"][0]["tool_calls"][0]["function"]["arguments"]


def test_nulls_that_a_table_may_have_added_to_tool_arguments_are_noted(tmp_path: Path) -> None:
    """JSON says whether a null is meant; a table has it for every field that another row has."""
    given = [{"a": 1, "b": None}, {"a": 1, "b": 2}]
    for name in ("a.parquet", "a.jsonl"):
        write(tmp_path / name, [calling(arguments) for arguments in given])
    table, lines = (list(read_file(tmp_path / name)) for name in ("a.parquet", "a.jsonl"))
    assert [arguments_of(raw) for raw in table] == [{"a": 1}, {"a": 1, "b": 2}]
    assert [raw.notes() for raw in table] == [{"nulls": "'b' is null"}, {}]
    assert [arguments_of(raw) for raw in lines] == given
    assert [raw.notes() for raw in lines] == [{}, {}]
    mapped = RawRow(1, {"t": [{"x": None}], "y": None}, {"tools": "t"}, is_of_table=True)
    assert mapped.notes() == {"nulls": "'x' is null"}


def test_maps_of_a_table_are_objects(tmp_path: Path) -> None:
    field = pa.map_(pa.string(), pa.string())
    column = pa.array([[("a", "1"), ("b", "2")], [("a", "1"), ("a", "2")]], field)
    pq.write_table(pa.table({"chosen": column.slice(0, 1)}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(1, {"chosen": {"a": "1", "b": "2"}})]
    write_arrow(tmp_path / "a.arrow", pa.table({"chosen": column}))
    with pytest.raises(DataError, match=r"map<string, string> does not .*; save it as parquet"):
        rows_of(tmp_path / "a.arrow")
    pq.write_table(pa.table({"chosen": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a map has a key twice"):
        rows_of(tmp_path / "a.parquet")


DAMAGED = ["a.parquet", "a.arrow", "a.txt", "a.jsonl.gz", "a.jsonl.bz2", "a.csv.xz", "a.json.zst"]


@pytest.mark.parametrize("name", [*DAMAGED, "a.parquet.gz"])
def test_damaged_or_unsupported_file_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"cannot (be )?read"):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("parquet", "text"), ("file", "text"), ("stream", "text"), ("file", "end"), ("stream", "end")],
)
def test_damaged_table_is_refused(tmp_path: Path, kind: str, damage: str) -> None:
    """Not UTF-8, or beyond the buffer: neither pyarrow nor `datasets` checks, and both crash."""
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    table = pa.table({"prompt": ["abc", "defg"]})
    if kind == "parquet":
        pq.write_table(table, path, use_dictionary=False, compression="none")
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as file:
            file.write_table(table)
    before, after = b"defg", b"d\xff\xffg"
    if damage == "end":
        before, after = (struct.pack("3i", 0, 3, end) for end in (7, 1 << 20))
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after))
    with pytest.raises(DataError, match=rf"{path.name}: the file cannot be read"):
        list(read_file(path))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_compressed_file_is_reported(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="the file cannot be read"):
        list(read_file(path))


def test_files_that_only_look_like_data_are_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "a.parquet").write_text(pointer)
    with pytest.raises(DataError, match=r"is a Git LFS pointer: .*git lfs pull"):
        list(read_file(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_bytes('{"a": "é"}'.encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"not valid utf-16.*save it as UTF-8"):
        list(read_file(tmp_path / "a.jsonl"))


def test_a_column_or_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """The last value would win."""
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nq,a,b,c\n")
    columns = [pa.array([text]) for text in "qabc"]
    table = pa.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "stream.arrow", table)
    for name in ("a.csv", "a.parquet", "stream.arrow"):
        with pytest.raises(DataError, match=r"has the column 'chosen' twice; remove or rename"):
            rows_of(tmp_path / name)
    line = '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}'
    (tmp_path / "a.jsonl").write_text(f'{line}\n{{"a": {{"b": 1, "b": 2}}}}\n{{}}\n')
    (tmp_path / "a.json").write_text(f"[{line}, {{}}]")
    assert rows_of(tmp_path / "a.jsonl") == [
        (1, "the key 'chosen' occurs twice"),
        (2, "the key 'b' occurs twice"),
        (3, {}),
    ]
    assert rows_of(tmp_path / "a.json") == [(1, "the key 'chosen' occurs twice"), (2, {})]
