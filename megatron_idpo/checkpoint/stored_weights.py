"""What a `torch_dist` checkpoint says it holds, and whether that can be true.

Only `metadata.json`, `.metadata` and the files' sizes are looked at: enough to tell a cut file, a
missing one and another model's checkpoint by name, before a tensor is read. megatron-core would
read on and fail in the middle, or, of another vocabulary, take what there is.
"""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_idpo.errors import CheckpointError

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""What the keys of weights start with, against those of optimizer state."""

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")

_USUAL_MULTIPLES = tuple(1 << power for power in range(14))
"""What a vocabulary is padded to a multiple of: TP (ours), or 128 x TP (Megatron-LM)."""

_MOST_RANKS = 64
"""Of tensor parallelism."""

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
    _check_marker(directory, "give the directory that `convert hf-to-megatron` wrote")
    metadata = _metadata(directory)
    weights = {
        key: StoredWeight(tuple(value.size), value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith(_MODEL_KEYS) and isinstance(value, TensorStorageMetadata)
    }
    _check_files(directory, metadata, weights)
    return weights


def check_same_model(
    directory: Path, expected: Mapping[str, Shape], vocab_size: int, num_kv_heads: int = 1
) -> None:
    """The checkpoint holds the weights of this model, no fewer and no others.

    Args:
        directory: the checkpoint.
        expected: the shapes of the model's whole weights by megatron-core key.
        vocab_size: without padding; the checkpoint's may have another one than the model's.
        num_kv_heads: of the model; its divisors are the tensor parallel sizes it can have had.

    Raises:
        CheckpointError: there is a difference; what `stored_weights` raises.
    """
    stored = stored_weights(directory)
    differences = [
        f"tensor {key!r} of shape {shape} is missing"
        for key, shape in expected.items()
        if key not in stored
    ]
    for key, weight in stored.items():
        if key not in expected:
            differences.append(f"tensor {key!r} of shape {weight.shape} is not expected")
            continue
        shape = expected[key]
        if key in _VOCABULARY_KEYS:
            shape = (vocab_size, *shape[1:])
            padded = _padded_sizes(vocab_size, num_kv_heads)
            matches = weight.shape[1:] == shape[1:] and weight.shape[0] in padded
        else:
            matches = weight.shape == shape
        if not matches:
            differences.append(f"tensor {key!r} has shape {weight.shape}, expected {shape}")
    if differences:
        # Of another model nearly everything differs, so one is told as an example.
        others = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise CheckpointError.at(
            str(directory),
            f"holds another model than its config.json says: {differences[0]}{others}",
            "put the configuration there that it was made with",
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run wants to find of a tensor in a checkpoint."""

    shape: Shape
    """Of the whole tensor."""

    elements: int
    """How many of them are trained: of some layers, it may be, and not of others."""

    padded: bool
    """Whether the first dimension is padded as the layout wants it."""


def check_holds(directory: Path, expected: Mapping[str, Expected]) -> None:
    """A checkpoint of training holds exactly these tensors, in files that are long enough.

    Args:
        directory: the checkpoint.
        expected: by key.

    Raises:
        CheckpointError: no such checkpoint, a missing or truncated file, or other tensors.
    """
    _check_marker(directory, "choose another checkpoint")
    metadata = _metadata(directory)
    stored = {
        key: value
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    _check_files(directory, metadata, stored)
    differences = [
        f"tensor {key!r} of shape {wanted.shape} is missing"
        for key, wanted in expected.items()
        if key not in stored
    ]
    differences += [
        f"tensor {key!r} {difference}"
        for key, found in stored.items()
        if (difference := _difference(found, expected.get(key)))
    ]
    if differences:
        others = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise CheckpointError.at(
            str(directory),
            f"is of a run that trains something else: {differences[0]}{others}",
            "resume with the model, LoRA settings and precision that the run began with, or name "
            "another output directory",
        )


def _difference(found: TensorStorageMetadata, wanted: Expected | None) -> str:
    """What is wrong with a tensor of a checkpoint; empty where nothing is."""
    shape = tuple(found.size)
    if wanted is None:
        return f"of shape {shape} is not trained here"
    # A vocabulary is padded by less than the tensor-parallel size.
    similar = wanted.padded and abs(shape[0] - wanted.shape[0]) < _MOST_RANKS
    if shape != wanted.shape and not (similar and shape[1:] == wanted.shape[1:]):
        return f"has shape {shape}, expected {wanted.shape}"
    elements = sum(prod(chunk.sizes) for chunk in found.chunks)
    if not wanted.padded and elements != wanted.elements:
        return f"has {elements:,} trained elements, expected {wanted.elements:,}"
    return ""


def _padded_sizes(vocab_size: int, num_kv_heads: int) -> set[int]:
    """How many rows a vocabulary can have by the rules of padding, none included.

    Not any number above it: one row more is rather a token that was added to the tokenizer.
    """
    tensor_sizes = (k for k in range(1, num_kv_heads + 1) if num_kv_heads % k == 0)
    return {-(-vocab_size // k) * k for k in (*_USUAL_MULTIPLES, *tensor_sizes)}


def _check_marker(directory: Path, remedy: str) -> None:
    """`metadata.json`, which megatron-core writes last, says that this is such a checkpoint."""
    path = directory / "metadata.json"
    if not path.is_file():
        message = "is no Megatron-Core checkpoint (no metadata.json)"
        raise CheckpointError.at(str(directory), message, remedy)
    with _damage(path):
        kind = json.loads(path.read_bytes())["sharded_backend"]
    if kind != "torch_dist":
        raise CheckpointError.at(str(path), f"the format is {kind!r}, not 'torch_dist'", remedy)


def _metadata(directory: Path) -> Metadata:
    with _damage(directory / ".metadata"):
        return FileSystemReader(directory).read_metadata()


def _check_files(directory: Path, metadata: Metadata, keys: Container[str]) -> None:
    """Every file reaches as far as the weights in it do."""
    ends: dict[str, list[tuple[int, str]]] = {}
    for index, info in (metadata.storage_data or {}).items():
        if index.fqn in keys:
            ends.setdefault(info.relative_path, []).append((info.offset + info.length, index.fqn))
    remedy = "copy it here again"
    for file, stops in ends.items():
        path = directory / file
        found = path.stat().st_size if path.is_file() else None
        for stop, key in sorted(stops):
            if found is None:
                message = f"is missing; by .metadata it holds tensor {key!r}"
                raise CheckpointError.at(str(path), message, remedy)
            if found < stop:
                message = f"is truncated in or before tensor {key!r}, which ends at byte {stop}: "
                raise CheckpointError.at(str(path), f"{message}{found} bytes", remedy)


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
