"""What a `torch_dist` checkpoint says it holds, and whether that can be true.

Only `metadata.json`, `.metadata` and the files' sizes are looked at: enough to tell a cut file, a
missing one and another model's checkpoint by name, before a tensor is read. megatron-core would
read on and fail in the middle, or, of another vocabulary, take what there is.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_idpo.errors import CheckpointError, Problem

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""What the keys of weights start with, against those of optimizer state."""

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")

_MAX_PADDING_ROWS = 4096
"""Of a vocabulary: Megatron-LM pads it to a multiple of 128 x TP. More is another vocabulary."""

_MAX_TOLD = 20
"""Problems shown of a checkpoint that is another model altogether."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """What is known of a weight before it is read."""

    shape: Shape
    """Of the whole weight; the layers of a model are stacked in the first dimension."""

    dtype: torch.dtype


def stored_weights(directory: Path) -> dict[str, StoredWeight]:
    """Every weight that a checkpoint holds, by its megatron-core key; its files checked for size.

    Raises:
        CheckpointError: no such checkpoint, or a missing or truncated file.
    """
    _check_marker(directory)
    metadata = _metadata(directory)
    _check_files(directory, metadata)
    return {
        key: StoredWeight(tuple(value.size), value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith(_MODEL_KEYS) and isinstance(value, TensorStorageMetadata)
    }


def check_same_model(directory: Path, expected: Mapping[str, Shape], vocab_size: int) -> None:
    """The checkpoint holds the weights of this model, no fewer and no others.

    Args:
        directory: the checkpoint.
        expected: the shapes of the model's whole weights by megatron-core key.
        vocab_size: without padding; the checkpoint's may have another one than the model's.

    Raises:
        CheckpointError: every difference; what `stored_weights` raises.
    """
    place, stored = str(directory), stored_weights(directory)
    problems = [
        Problem(place, f"tensor {key!r} of shape {shape} is missing")
        for key, shape in expected.items()
        if key not in stored
    ]
    for key, weight in stored.items():
        if key not in expected:
            problems.append(Problem(place, f"unexpected tensor {key!r} {weight.shape}"))
            continue
        shape = expected[key]
        if key in _VOCABULARY_KEYS:
            padding_rows = weight.shape[0] - vocab_size
            matches = weight.shape[1:] == shape[1:] and 0 <= padding_rows <= _MAX_PADDING_ROWS
            shape = (vocab_size, *shape[1:])
        else:
            matches = weight.shape == shape
        if not matches:
            told = f"tensor {key!r} has shape {weight.shape}, config.json asks for {shape}"
            problems.append(Problem(place, told))
    if len(problems) > _MAX_TOLD:
        more = Problem(place, f"{len(problems) - _MAX_TOLD + 1} more problems like these")
        problems = [*problems[: _MAX_TOLD - 1], more]
    if problems:
        raise CheckpointError.of(problems)


def _check_marker(directory: Path) -> None:
    """`metadata.json`, which megatron-core writes last, says that this is such a checkpoint."""
    remedy = "give the directory that `convert hf-to-megatron` wrote"
    path = directory / "metadata.json"
    if not path.is_file():
        told = "is no Megatron-Core checkpoint (no metadata.json)"
        raise CheckpointError.at(str(directory), told, remedy)
    with _damage(path):
        kind = json.loads(path.read_bytes())["sharded_backend"]
    if kind != "torch_dist":
        raise CheckpointError.at(str(path), f"the format is {kind!r}, not 'torch_dist'", remedy)


def _metadata(directory: Path) -> Metadata:
    with _damage(directory / ".metadata"):
        return FileSystemReader(directory).read_metadata()


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Every file reaches as far as its tensors do."""
    sizes: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        path = directory / info.relative_path
        if info.relative_path not in sizes:
            sizes[info.relative_path] = path.stat().st_size if path.is_file() else -1
        found = sizes[info.relative_path]
        told = f"by .metadata it holds tensor {index.fqn!r}"
        if found < 0:
            raise CheckpointError.at(str(path), f"is missing; {told}", "copy it here again")
        if found < info.offset + info.length:
            raise CheckpointError.at(
                str(path),
                f"is truncated in or before tensor {index.fqn!r}: {found} bytes, which needs "
                f"{info.offset + info.length}",
                "copy it here again",
            )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """A small file that is not what it should be: JSON and pickle fail in many ways."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError.at(
            str(path), f"is missing or damaged ({reason})", "copy the checkpoint here again"
        ) from error
