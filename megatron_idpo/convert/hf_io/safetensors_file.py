"""Safetensors files: the tensors that a file holds, and the layout of a file to be written.

Reading is the library's. Writing is ours, because the library's writer needs all tensors of a file
in memory at once; `plan_file` computes the library's own layout:

    8 bytes   length of the header, little-endian
    header    JSON, {name: {dtype, shape, data_offsets}}, padded with spaces to a multiple of 8
    data      the tensors one after another, without gaps
"""

import json
import math
from collections.abc import Buffer, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.checksums import CHANGED, Checksum

_GIT_LFS_START = b"version "
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

CHECKSUMS = "megatron_idpo.xxh3_128"
"""Key in a file's metadata: the checksum of each tensor, in the order of their positions."""

_CHECKSUM_DIGITS = 32

# In the order in which the library lays tensors out: widest element first, so all are aligned.
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
_ORDER = {dtype: index for index, dtype in enumerate(_DTYPE_NAMES)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of a tensor, without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def checksum(self, content: Buffer) -> str:
        """Of name, dtype, shape and values: 32 hexadecimal digits."""
        total = Checksum()
        total.update(f"{self.name} {self.dtype} {self.shape} ".encode())
        total.update(content)
        return total.text()


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The layout of a file that is going to be written."""

    header: bytes
    """The first bytes of the file, the length field included."""

    tensors: tuple[tuple[TensorSpec, int], ...]
    """Every tensor with the position of its first byte in the file."""

    num_bytes: int
    """The size of the complete file."""

    def checksums(self, by_name: Mapping[str, str]) -> str:
        """The metadata of the complete file, as long for all checksums; zeros if unknown."""
        zeros = "0" * _CHECKSUM_DIGITS
        return "".join(by_name.get(spec.name, zeros) for spec, _ in self.tensors)


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file by name; their data is not read.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, lists a name twice, or
            has a tensor of a dtype that torch does not have.
    """
    with opened(path) as file:
        specs = {name: read_spec(path, file, name) for name in file.keys()}
    if (name := _repeated_name(path)) is not None:
        # The library reads the last one: which of the two was meant is unknown.
        raise _damaged(path, f"the header lists {name!r} twice")
    return specs


def check_tensors(path: Path, *, share: int = 0, shares: int = 1) -> None:
    """Compares tensors with the checksums in the file; a file without them is not read.

    Exports of training have them; conversions and files of other programs do not.

    Args:
        path: the file.
        share: which of the tensors: those of this rank, if the ranks divide the work.
        shares: into how many parts they are divided.

    Raises:
        CheckpointError: a tensor has been changed, or the file cannot be read.
    """
    with opened(path) as file:
        text = (file.metadata() or {}).get(CHECKSUMS)
        if text is None:
            return
        specs = sorted((read_spec(path, file, name) for name in file.keys()), key=_position)
        if len(text) != len(specs) * _CHECKSUM_DIGITS:
            message = f"its {CHECKSUMS} has {len(text)} digits for {len(specs)} tensors"
            raise _damaged(path, message)
        for index in range(share, len(specs), shares):
            spec, start = specs[index], index * _CHECKSUM_DIGITS
            content = file.get_tensor(spec.name).reshape(-1).view(torch.uint8)
            found = spec.checksum(memoryview(content.numpy()))
            if found != text[start : start + _CHECKSUM_DIGITS]:
                message, remedy = f"{CHANGED} (in tensor {spec.name!r})", "export or copy it again"
                raise CheckpointError.at(str(path), message, remedy)


def _repeated_name(path: Path) -> str | None:
    """A name that the header lists twice; None if there is none."""
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                repeated.append(name)
            seen.add(name)
        return {}

    with CheckpointError.on_os_error(str(path), "cannot be read"), path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(num_bytes)
    json.loads(header, object_pairs_hook=note_repeated)
    return repeated[0] if repeated else None


def read_spec(path: Path, file: Any, name: str) -> TensorSpec:
    """The description of one tensor in an open file of `opened`; errors as of `read_specs`."""
    entry = file.get_slice(name)
    dtype = entry.get_dtype()
    if dtype not in _DTYPES:
        message = f"tensor {name!r} has the dtype {dtype}, which is not supported"
        raise CheckpointError.at(str(path), message)
    return TensorSpec(name, tuple(entry.get_shape()), _DTYPES[dtype])


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open `safe_open` handle; the library maps the file into memory and checks its header.

    Mapped pages count as page cache, not as memory of the process: reading a file larger than the
    memory limit of a cgroup works (checked with 800 MB under a limit of 600 MB).

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, now or within the block.
    """
    with CheckpointError.on_os_error(str(path), "cannot be read"):
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, RuntimeError) as error:  # RuntimeError: torch cannot map the file
            raise _damaged(path, error) from None
        try:
            with file:
                yield file
        except SafetensorError as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    with path.open("rb") as file:
        start = file.read(len(_GIT_LFS_START))
    if start == _GIT_LFS_START:
        message, remedy = "is a Git LFS pointer, not the weights", "run `git lfs pull` there"
        return CheckpointError.at(str(path), message, remedy)
    reason = " ".join(str(error).split())
    message = f"is truncated, damaged or not a safetensors file ({path.stat().st_size} bytes)"
    return CheckpointError.at(str(path), f"{message}: {reason}", "download or copy it again")


def _position(spec: TensorSpec) -> tuple[int, str]:
    """The library's order of tensors in a file."""
    return _ORDER[spec.dtype], spec.name


def plan_file(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FilePlan:
    """Lays tensors out in one file, in the order of the safetensors library.

    Raises:
        CheckpointError: safetensors cannot store one of the dtypes.
    """
    for spec in specs:
        if spec.dtype not in _DTYPE_NAMES:
            raise CheckpointError.at(spec.name, f"safetensors cannot store {spec.dtype}")
    ordered = sorted(specs, key=_position)
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
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    tensors = [(spec, len(header) + start) for spec, start in zip(ordered, offsets, strict=True)]
    return FilePlan(header, tuple(tensors), len(header) + offset)
