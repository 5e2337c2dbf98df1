"""Open text files as UTF-8 bytes: decompressed by suffix, decoded by byte order mark."""

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_READ_BYTES = 1 << 16

_WIDE_ENCODINGS = (
    # The mark of UTF-32 begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _open_zstd(path: Path, _: str) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}

COMPRESSIONS = tuple(_OPENERS)
"""Suffixes of compressed files."""


@contextmanager
def open_utf8(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a text file, decompressed; UTF-16 and UTF-32 are converted to UTF-8.

    UTF-8 is not checked, and its byte order mark is kept.

    Raises:
        UnicodeDecodeError: while reading; a file with the mark of UTF-16 or UTF-32 is not valid.
    """
    with ExitStack() as stack:
        opener = _OPENERS.get(path.suffix.lower(), open)
        raw = io.BufferedReader(stack.enter_context(opener(path, "rb")), _READ_BYTES)
        start = raw.peek(4)
        encoding = next((name for mark, name in _WIDE_ENCODINGS if start.startswith(mark)), None)
        yield raw if encoding is None else io.BufferedReader(_AsUtf8(raw, encoding), _READ_BYTES)


class _AsUtf8(io.RawIOBase):
    """A stream in another encoding, as UTF-8 bytes."""

    def __init__(self, raw: BinaryIO, encoding: str) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._converted = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_end = False
        while not self._converted and not is_end:
            encoded = self._raw.read(_READ_BYTES)
            is_end = not encoded
            self._converted = self._decoder.decode(encoded, is_end).encode()
        count = min(len(buffer), len(self._converted))
        buffer[:count], self._converted = self._converted[:count], self._converted[count:]
        return count
