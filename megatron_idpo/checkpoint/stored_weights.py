"""The tensors that a `torch_dist` checkpoint holds, checked before any of them is read.

Only `metadata.json`, `.metadata` and the file sizes are read, by one rank for all. That is enough
to name a truncated or missing file and to recognize another model's checkpoint. megatron-core would
start to read and fail in the middle, or load a part of another vocabulary.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_idpo.checkpoint.contents import Contents, contents_if_recorded
from megatron_idpo.checkpoint.dcp_metadata import read_dcp_metadata
from megatron_idpo.errors import CheckpointError

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""Prefixes of the keys of weights; those of optimizer state have others."""

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")

_USUAL_MULTIPLES = tuple(1 << power for power in range(14))
"""A vocabulary is padded to a multiple of TP (this package), or of 128 x TP (Megatron-LM)."""

_MAX_TENSOR_PARALLEL = 64

_NOT_A_CHECKPOINT = "name a directory that `convert hf-to-megatron` wrote"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in a checkpoint, without its values."""

    shape: Shape
    """Of the whole weight; the layers of a model are stacked in the first dimension."""

    dtype: torch.dtype


def stored_weights(directory: Path) -> dict[str, StoredWeight]:
    """Every weight of a checkpoint by its megatron-core key; checks the size of its files.

    Raises:
        CheckpointError: there is no such checkpoint; a file is missing, truncated or was changed.
    """
    contents_if_recorded(directory)  # before anything is parsed
    return _weights(_stored_tensors(directory, _MODEL_KEYS, _NOT_A_CHECKPOINT)[1])


def _weights(tensors: Mapping[str, TensorStorageMetadata]) -> dict[str, StoredWeight]:
    return {
        key: StoredWeight(tuple(tensor.size), tensor.properties.dtype)
        for key, tensor in tensors.items()
    }


def check_same_model(
    directory: Path, expected: Mapping[str, Shape], vocab_size: int, num_kv_heads: int = 1
) -> Metadata:
    """Checks that the checkpoint holds exactly the weights of this model; returns its list.

    Args:
        directory: the checkpoint.
        expected: megatron-core key -> shape of the model's whole weights.
        vocab_size: without padding; the checkpoint may be padded differently from the model.
        num_kv_heads: of the model; its divisors are the possible tensor-parallel sizes.

    Raises:
        CheckpointError: there is a difference; also what `stored_weights` raises, but for changed
            small files.
    """
    metadata, tensors = _stored_tensors(directory, _MODEL_KEYS, _NOT_A_CHECKPOINT)
    stored = _weights(tensors)
    sizes = _padded_sizes(vocab_size, num_kv_heads)
    differences = _missing(expected, stored)
    for key, weight in stored.items():
        shape = expected.get(key)
        if shape is None:
            differences.append(f"tensor {key!r} of shape {weight.shape} is not expected")
            continue
        if key in _VOCABULARY_KEYS:
            shape = (vocab_size, *shape[1:])
        is_padded = key in _VOCABULARY_KEYS and weight.shape[0] in sizes
        if weight.shape != shape and not (is_padded and weight.shape[1:] == shape[1:]):
            differences.append(f"tensor {key!r} has shape {weight.shape}, expected {shape}")
    _raise_first(
        directory,
        "is not the model that its config.json describes",
        differences,
        "put the matching config.json there",
    )
    return metadata


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a run needs from a training checkpoint."""

    shape: Shape
    """Of the whole tensor."""

    elements: int
    """Number of trained elements; less than the whole if some layers are frozen."""

    padded: bool
    """Whether the layout pads the first dimension."""


def check_trained_tensors(contents: Contents, expected: Mapping[str, ExpectedTensor]) -> Metadata:
    """Checks that a training checkpoint holds exactly these tensors in complete files.

    Returns its list of tensors.

    Args:
        contents: of the checkpoint.
        expected: by key.

    Raises:
        CheckpointError: there is no such checkpoint, a missing or truncated file, other tensors.
    """
    directory, remedy = contents.directory, "choose another checkpoint"
    metadata, stored = _stored_tensors(directory, ("",), remedy, damage_remedy=contents.remedy)
    differences = _missing({key: tensor.shape for key, tensor in expected.items()}, stored)
    differences += [
        f"tensor {key!r} {difference}"
        for key, tensor in stored.items()
        if (difference := _difference(tensor, expected.get(key)))
    ]
    _raise_first(
        directory,
        "is of a run that trains other tensors",
        differences,
        "resume with the model, LoRA settings and precision of that run, or name another output "
        "directory",
    )
    return metadata


def _difference(stored: TensorStorageMetadata, expected: ExpectedTensor | None) -> str:
    """How a stored tensor differs from the expected one; empty if it does not."""
    shape = tuple(stored.size)
    if expected is None:
        return f"of shape {shape} is not trained here"
    # The padding of a vocabulary is less than the tensor-parallel size.
    is_close = abs(shape[0] - expected.shape[0]) < _MAX_TENSOR_PARALLEL
    is_other_padding = expected.padded and is_close and shape[1:] == expected.shape[1:]
    if shape != expected.shape and not is_other_padding:
        return f"has shape {shape}, expected {expected.shape}"
    elements = sum(prod(chunk.sizes) for chunk in stored.chunks)
    if not expected.padded and elements != expected.elements:
        return f"has {elements:,} trained elements, expected {expected.elements:,}"
    return ""


def _missing(expected: Mapping[str, Shape], stored: Container[str]) -> list[str]:
    return [
        f"tensor {key!r} of shape {shape} is missing"
        for key, shape in expected.items()
        if key not in stored
    ]


def _raise_first(directory: Path, message: str, differences: Sequence[str], remedy: str) -> None:
    """Raises an error with the first difference: of another model, nearly all tensors differ."""
    if differences:
        others = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        message = f"{message}: {differences[0]}{others}"
        raise CheckpointError.at(str(directory), message, remedy)


def _padded_sizes(vocab_size: int, num_kv_heads: int) -> set[int]:
    """The possible numbers of rows of a padded or unpadded vocabulary.

    Only those that a padding rule gives: one row more is rather a token that was added.
    """
    tensor_sizes = (k for k in range(1, num_kv_heads + 1) if num_kv_heads % k == 0)
    return {-(-vocab_size // k) * k for k in (*_USUAL_MULTIPLES, *tensor_sizes)}


def _stored_tensors(
    directory: Path,
    prefixes: tuple[str, ...],
    remedy: str,
    *,
    damage_remedy: str = "copy it here again",
) -> tuple[Metadata, dict[str, TensorStorageMetadata]]:
    """The list of a checkpoint, and its tensors whose keys have one of the prefixes.

    Their files exist and are long enough.

    Args:
        directory: the checkpoint.
        prefixes: of the keys.
        remedy: if it is not such a checkpoint.
        damage_remedy: if a file is missing or truncated.
    """
    path = directory / "metadata.json"  # which megatron-core writes last
    if not path.is_file():
        message = "is not a Megatron-Core checkpoint (no metadata.json)"
        raise CheckpointError.at(str(directory), message, remedy)
    with _reported_damage(path):
        backend = json.loads(path.read_bytes())["sharded_backend"]
    if backend != "torch_dist":
        raise CheckpointError.at(str(path), f"the format is {backend!r}, not 'torch_dist'", remedy)
    metadata = read_dcp_metadata(directory)
    tensors = {
        key: value
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith(prefixes) and isinstance(value, TensorStorageMetadata)
    }
    _check_files(directory, metadata, tensors, damage_remedy)
    return metadata, tensors


def _check_files(directory: Path, metadata: Metadata, keys: Container[str], remedy: str) -> None:
    """Checks that every file is at least as long as the tensors in it require."""
    stops_by_file: dict[str, list[tuple[int, str]]] = {}
    for index, info in (metadata.storage_data or {}).items():
        if index.fqn in keys:
            stops = stops_by_file.setdefault(info.relative_path, [])
            stops.append((info.offset + info.length, index.fqn))
    for file, stops in stops_by_file.items():
        path = directory / file
        if not path.is_file():
            message = f"is missing; .metadata lists tensor {min(stops)[1]!r} in it"
            raise CheckpointError.at(str(path), message, remedy)
        num_bytes = path.stat().st_size
        for stop, key in sorted(stops):
            if num_bytes < stop:
                message = f"is truncated in or before tensor {key!r}, which ends at byte {stop}"
                raise CheckpointError.at(str(path), f"{message}: {num_bytes} bytes", remedy)


@contextmanager
def _reported_damage(path: Path) -> Iterator[None]:
    """Turns any error of parsing a small file into a `CheckpointError`."""
    try:
        yield
    except Exception as error:  # JSON and pickle fail in many ways
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError.at(
            str(path), f"is missing or damaged ({reason})", "copy the checkpoint here again"
        ) from error
