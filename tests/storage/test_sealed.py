"""Every change of a sealed file is detected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError, DataError
from megatron_idpo.storage.sealed import SEAL, read_sealed, seal_of, write_sealed

VALUES: dict[str, Any] = {"a": 1, "b": 0.1, "c": {"é/x": [None, True, 1e-7]}, "d": "–"}
REMEDY = "put it back"
CHANGED = r"x\.json: has been changed since .* written(, or another version .*)?; put it back$"


def written(tmp_path: Path, indent: int | None = 1) -> Path:
    path = tmp_path / "x.json"
    write_sealed(path, VALUES, indent=indent)
    return path


def refused(path: Path, content: bytes, indent: int | None = 1) -> None:
    """Asserts that a file with this content is refused."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=CHANGED) as raised:
        read_sealed(path, remedy=REMEDY, indent=indent)
    assert raised.value.problems[0].location == str(path)


@pytest.mark.parametrize("content", [b"{}\n", b'{"a": 1, "sha256": null}\n'])
def test_file_without_a_seal_may_be_of_another_version(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    message = r"has been changed since it was written, or another version wrote it; put it back"
    with pytest.raises(CheckpointError, match=message):
        read_sealed(tmp_path / "x.json", remedy=REMEDY)


def test_error_has_the_requested_class(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[1:])
    with pytest.raises(DataError, match=CHANGED):
        read_sealed(path, remedy=REMEDY, error=DataError)
    with pytest.raises(DataError, match="cannot be written: No such file"):
        write_sealed(tmp_path / "none" / "x", VALUES, error=DataError)


@pytest.mark.parametrize("indent", [1, None])
def test_values_round_trip(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path, indent)
    assert read_sealed(path, remedy=REMEDY, indent=indent) == VALUES
    assert json.loads(path.read_bytes()) == {**VALUES, SEAL: seal_of(VALUES, indent=indent)}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (path.read_text("utf-8").count("\n") == 1) == (indent is None)


def test_the_text_depends_on_the_values_alone(tmp_path: Path) -> None:
    first = written(tmp_path).read_bytes()
    assert written(tmp_path).read_bytes() == first
    assert seal_of(VALUES) != seal_of({**VALUES, "a": 2})
    assert seal_of(VALUES) != seal_of(dict(reversed(VALUES.items())))


@pytest.mark.parametrize("indent", [1, None])
@pytest.mark.parametrize(
    "bits", [1, pytest.param(8, marks=pytest.mark.exhaustive)], ids=["one bit", "all bits"]
)
def test_every_flipped_bit_is_detected(tmp_path: Path, indent: int | None, bits: int) -> None:
    """In every byte: one bit, another one in the next byte; all eight in the exhaustive run."""
    path = written(tmp_path, indent)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(at % 8, at % 8 + bits):
            bit %= 8
            refused(path, whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :], indent)
    path.write_bytes(whole)
    assert read_sealed(path, remedy=REMEDY, indent=indent) == VALUES


def test_every_lost_doubled_or_added_byte_is_detected(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for replacement in (b"", 2 * whole[at : at + 1], b" " + whole[at : at + 1]):
            refused(path, whole[:at] + replacement + whole[at + 1 :])
        refused(path, whole[:at])


EDITORS: dict[str, Callable[[bytes], bytes]] = {
    "other line ends": lambda text: text.replace(b"\n", b"\r\n"),
    "no last line end": lambda text: text.rstrip(b"\n"),
    "one more line end": lambda text: text + b"\n",
    "spaces at line ends": lambda text: text.replace(b"\n", b" \n"),
    "tabs": lambda text: text.replace(b"\n ", b"\n\t"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "another coding": lambda text: text.decode().encode("utf-16"),
    "escapes": lambda text: (json.dumps(json.loads(text), indent=1) + "\n").encode(),
    "another indent": lambda text: (
        json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
    ).encode(),
    "other order": lambda text: (
        json.dumps(dict(reversed(json.loads(text).items())), indent=1, ensure_ascii=False) + "\n"
    ).encode(),
    "another spelling of a number": lambda text: text.replace(b"1e-07", b"1.0e-7"),
    "a name twice": lambda text: text.replace(b'"a": 1,', b'"a": 2,\n "a": 1,'),
}


@pytest.mark.parametrize("edit", EDITORS.values(), ids=EDITORS)
def test_edits_are_detected(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    path = written(tmp_path)
    content = edit(path.read_bytes())
    assert content != path.read_bytes()
    refused(path, content)


@pytest.mark.parametrize("content", [b"", b"[]\n", b"1\n", b"null\n", b"\xff", b"{"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "x.json", content)


@pytest.mark.parametrize("indents", [(1, None), (None, 1)])
def test_other_indent_is_refused(tmp_path: Path, indents: tuple[int | None, int | None]) -> None:
    path = written(tmp_path, indents[0])
    refused(path, path.read_bytes(), indents[1])


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json: cannot be read: No such file.*put it ba"):
        read_sealed(tmp_path / "x.json", remedy=REMEDY)


def test_unwritable_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json: cannot be written: No such file.*; check"):
        write_sealed(tmp_path / "missing" / "x.json", VALUES)


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_sealed(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()
