"""`.metadata`, the list of tensors of a `torch_dist` checkpoint, read without running code from it.

The file is a pickle, and unpickling calls any function that the file names. The readers of torch
and megatron-core use `pickle.load`; this one knows only what torch.distributed.checkpoint (DCP) and
megatron-core's `dist_checkpointing` write, and checks what it has read, so that a damaged file is
reported here and not as a wrong attribute somewhere else.
"""

import pickle
from enum import Enum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_idpo.errors import CheckpointError

FILE = ".metadata"

_WRITTEN = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # megatron-core stores the plans of all ranks, to compare them with those of the next save.
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}
"""Module -> the names of it that a `.metadata` may hold, with torch's dtypes and layouts."""

_OWNERS = ("torch.distributed.", "megatron.core.")
"""Modules of the classes whose new objects get attributes."""

_NEVER_WRITTEN = b"".join(
    (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID, pickle.BYTEARRAY8)
)
"""Instructions for other names and objects than those in the file."""

_MAX_SHOWN = 100

_MAX_TUPLE_DEPTH = 20
"""DCP writes 3 levels. A tuple's hash recurses in C without a limit: 100,000 end in SIGSEGV."""


class _ForbiddenError(pickle.UnpicklingError):
    pass


def read_dcp_metadata(directory: Path) -> Metadata:
    """The list of tensors of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else than such a list.
    """
    path = directory / FILE
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        _check(metadata)
    except _ForbiddenError as error:
        message = f"holds {error}, which no checkpoint has: reading it could run code"
        remedy = "take the checkpoint from a source that you trust"
        raise CheckpointError.at(str(path), message, remedy) from None
    except Exception as error:  # a damaged pickle fails in many ways
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        message, remedy = f"is missing or damaged ({reason})", "copy the checkpoint here again"
        if isinstance(error, OSError):
            raise CheckpointError.of_os_error(str(path), message, error, remedy) from error
        raise CheckpointError.at(str(path), message, remedy) from error
    assert isinstance(metadata, Metadata)
    return metadata


class _Unpickler(pickle._Unpickler):
    """Finds only the names of `_WRITTEN` and torch's dtypes, and changes only new objects.

    In Python, because the C implementation cannot be kept from setting attributes of the classes
    themselves. It reads about a million instructions per second, 30,000 stored chunks.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # Python 3.11 writes members of enumerations with it
        if name not in _WRITTEN.get(module, ()):
            raise _ForbiddenError(f"{module}.{name}"[:_MAX_SHOWN])
        return getattr(import_module(module), name)

    def _build(self) -> None:
        target = getattr(self, "stack")[-2]  # noqa: B009 - not in typeshed
        if isinstance(target, Enum) or not type(target).__module__.startswith(_OWNERS):
            raise _ForbiddenError(f"a change of {type(target).__name__}")
        build: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
        build(self)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._depths: dict[int, tuple[int, Any]] = {}

    def _tuple(self, code: int) -> None:
        build: Any = pickle._Unpickler.dispatch[code]
        build(self)
        made = getattr(self, "stack")[-1]  # noqa: B009 - not in typeshed
        inner = (self._depths.get(id(part), (1, None))[0] for part in made if type(part) is tuple)
        depth = 1 + max(inner, default=0)
        if depth > _MAX_TUPLE_DEPTH:
            raise pickle.UnpicklingError(f"tuples in more than {_MAX_TUPLE_DEPTH} levels")
        if depth > 1:  # Kept, so that no other object gets its id.
            self._depths[id(made)] = depth, made

    dispatch: ClassVar[dict[int, Any]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()
        if code not in _NEVER_WRITTEN
    }
    dispatch[pickle.BUILD[0]] = _build
    for _code in b"".join((pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)):
        dispatch[_code] = partial(_tuple, code=_code)


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise _ForbiddenError("a layout that torch does not have")
    return layout


def _enum_member(owner: Any, name: str) -> Any:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise _ForbiddenError("builtins.getattr")
    return owner[name]


def _check(metadata: Any) -> None:
    """Checks the types and values that readers rely on.

    Raises:
        ValueError: something is not as DCP writes it.
    """
    _require(type(metadata) is Metadata, "not a list of tensors")
    tensors, files = metadata.state_dict_metadata, metadata.storage_data
    _require(isinstance(tensors, dict) and isinstance(files, dict), "no tensors or no files")
    for key, stored in tensors.items():
        _require(isinstance(key, str), "a key is not text")
        if type(stored) is not BytesStorageMetadata:
            _require(type(stored) is TensorStorageMetadata, f"entry {key!r}")
            _check_tensor(key, stored)
    for index, info in files.items():
        _require(type(index) is MetadataIndex and type(info) is _StorageInfo, "an entry of a file")
        _require(isinstance(index.fqn, str), "a key is not text")
        _require(index.offset is None or _is_shape(index.offset), f"offset of {index.fqn!r}")
        _require(_is_file_name(info.relative_path), f"file name of {index.fqn!r}")
        _require(_is_shape((info.offset, info.length)), f"position of {index.fqn!r}")
        _require(not info.transform_descriptors, f"{index.fqn!r} is compressed or encrypted")


def _check_tensor(key: str, stored: TensorStorageMetadata) -> None:
    _require(_is_shape(stored.size), f"shape of {key!r}")
    properties = stored.properties
    _require(type(properties) is TensorProperties, f"properties of {key!r}")
    _require(isinstance(properties.dtype, torch.dtype), f"dtype of {key!r}")
    _require(isinstance(stored.chunks, list), f"chunks of {key!r}")
    for chunk in stored.chunks:
        _require(type(chunk) is ChunkStorageMetadata, f"chunks of {key!r}")
        _require(_is_shape(chunk.offsets) and _is_shape(chunk.sizes), f"chunks of {key!r}")
        parts = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        _require(all(start + size <= whole for start, size, whole in parts), f"chunks of {key!r}")


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and size >= 0 for size in value)


def _is_file_name(value: Any) -> bool:
    """A file of the same directory: the list does not name others."""
    return isinstance(value, str) and Path(value).name == value and "\0" not in value


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
