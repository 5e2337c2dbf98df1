"""The header of a safetensors file: which tensor lies where.

    8 bytes   length of the header, little-endian
    header    JSON, {name: {dtype, shape, data_offsets}}, padded with spaces to a multiple of 8
    data      the tensors one after another, without gaps

Read here rather than by the safetensors library, because its readers return views of a memory map
of the whole file (2.8 GB resident after summing a 2 GB file tensor by tensor, measured on 0.8) and
its errors name no tensor; and written here because its writer wants all tensors at once. Whatever
`read_header` accepts the library accepts too, and `plan_file` gives the library's own bytes.

No tensor data is touched here: see `hf_reader` and `hf_writer`.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit: a longer header is garbage."""

_DOWNLOAD_AGAIN = "download or copy this file again"
_GIT_LFS_START = b"version "
_METADATA = "__metadata__"

# In the order in which the library lays tensors out (widest first, so that all are aligned).
_DTYPE_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_ORDER = {dtype: location for location, dtype in enumerate(_DTYPE_NAMES)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor and the position of its first byte, counted from the start of the file."""

    spec: TensorSpec
    start: int

    @property
    def stop(self) -> int:
        """The position after its last byte."""
        return self.start + self.spec.num_bytes


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file before it has any data: its header, length included, and a place for each tensor."""

    header: bytes
    placements: tuple[Placement, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the complete file."""
        return self.placements[-1].stop if self.placements else len(self.header)


def plan_file(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FilePlan:
    """Lays the tensors out in one file, in the order of the safetensors library.

    Raises:
        CheckpointError: a format that safetensors cannot store.
    """
    for spec in specs:
        if spec.dtype not in _DTYPE_NAMES:
            raise CheckpointError.at(spec.name, f"safetensors cannot store {spec.dtype}")
    ordered = sorted(specs, key=lambda spec: (_ORDER[spec.dtype], spec.name))
    document: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    offsets = []
    for spec in ordered:
        offsets.append(offset)
        document[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return FilePlan(
        header,
        tuple(Placement(spec, len(header) + at) for spec, at in zip(ordered, offsets, strict=True)),
    )


def read_header(path: Path) -> dict[str, Placement]:
    """Where each tensor of a safetensors file lies, by name.

    Raises:
        CheckpointError: the file cannot be read, is no safetensors file, or its size or its
            header's offsets contradict each other; names the file and, where there is one, the
            tensor.
    """
    text, file_bytes = _header_text(path)
    try:
        document = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
        _check_metadata(document.pop(_METADATA, None))
        data_start = LENGTH_BYTES + len(text)
        placements = [_placement(name, value, data_start) for name, value in document.items()]
        placements.sort(key=lambda placement: (placement.start, placement.stop))
        _check_contiguous(placements, data_start)
    except (ValueError, RecursionError) as error:  # a JSON or Unicode error is a ValueError
        raise CheckpointError.at(
            str(path), f"the safetensors header is garbage: {error}", _DOWNLOAD_AGAIN
        ) from None
    _check_size(path, placements, data_start, file_bytes)
    return {placement.spec.name: placement for placement in placements}


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON, and the size of the file."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_BYTES)
            text_bytes = int.from_bytes(start, "little")
            fits = LENGTH_BYTES + text_bytes <= file_bytes and text_bytes <= MAX_HEADER_BYTES
            text = file.read(text_bytes) if fits else b""
    except OSError as error:
        raise CheckpointError.at(str(path), f"cannot be read: {error.strerror}") from None
    if start == _GIT_LFS_START:
        raise CheckpointError.at(
            str(path), "is a Git LFS pointer, not the weights", "run `git lfs pull` there"
        )
    if len(start) < LENGTH_BYTES or len(text) < text_bytes or not text.startswith(b"{"):
        raise CheckpointError.at(
            str(path),
            f"is truncated within its header or no safetensors file: {file_bytes} bytes, "
            f"beginning with {start!r}",
            _DOWNLOAD_AGAIN,
        )
    return text, file_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is listed twice")
    return document


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{_METADATA} does not map strings to strings")


def _placement(name: str, value: Any, data_start: int) -> Placement:
    """One entry of the header, checked; ValueError with the reason."""
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype = entry.get("dtype")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no valid shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the format {dtype!r}, which is not supported")
    spec = TensorSpec(name, tuple(shape), _DTYPES[dtype])
    # Against numbers that no tensor can have, also where a zero hides them from the product.
    if math.prod(size or 1 for size in shape) >= 2**48:
        raise ValueError(f"tensor {name!r} has the impossible shape {shape}")
    if spec.num_bytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {name!r} has {spec.num_bytes} bytes by its shape {shape} and format {dtype}, "
            f"but {offsets[1] - offsets[0]} by its data_offsets"
        )
    return Placement(spec, data_start + offsets[0])


def _sizes(value: Any) -> list[int] | None:
    """A JSON list of natural numbers; None if it is something else."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None


def _check_contiguous(placements: Sequence[Placement], data_start: int) -> None:
    """Tensors follow one another without gaps or overlaps; ValueError otherwise."""
    expected = data_start
    for placement in placements:
        if placement.start != expected:
            raise ValueError(
                f"tensor {placement.spec.name!r} begins at byte {placement.start}, not {expected}"
            )
        expected = placement.stop


def _check_size(
    path: Path, placements: Sequence[Placement], data_start: int, file_bytes: int
) -> None:
    """The file ends where its last tensor does."""
    expected = placements[-1].stop if placements else data_start
    if file_bytes > expected:
        raise CheckpointError.at(
            str(path),
            f"has {file_bytes} bytes, {file_bytes - expected} more than its tensors",
            _DOWNLOAD_AGAIN,
        )
    if file_bytes < expected:
        cut = next(placement for placement in placements if placement.stop > file_bytes)
        raise CheckpointError.at(
            str(path),
            f"is truncated in tensor {cut.spec.name!r}: {file_bytes} bytes instead of {expected}",
            _DOWNLOAD_AGAIN,
        )
