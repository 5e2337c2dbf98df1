"""Models to start from: a Hugging Face directory, a hub model, or a checkpoint of this package.

`open_model` reads configuration and headers only, so that a run can be checked before any weight is
read; `load_base` then fills this rank's chunks. `FrozenModel` adds the identity of the weights.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch.distributed as dist

from megatron_idpo.checkpoint.model_directory import COMPANIONS, companion_files
from megatron_idpo.checkpoint.snapshot_metadata import (
    Snapshot,
    check_digests,
    check_names,
    whole_snapshot,
)
from megatron_idpo.checkpoint.weights import load_weights
from megatron_idpo.convert.hf_io.hub import download_model
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.tokenizer_files import (
    CONFIG_FILE,
    check_vocabulary,
    read_json_object,
)
from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf, read_architecture
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.parallel.world import all_gather_objects, raise_on_all_ranks
from megatron_idpo.storage.provenance import file_digest

_WEIGHT_FILES = ("*.safetensors", "*.distcp", ".metadata")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint whose configuration and headers have been read, but not its weights."""

    directory: Path
    architecture: Architecture
    companions: tuple[Path, ...]
    """Configuration and tokenizer files, which are copied to exports."""

    hf: HfCheckpoint | None
    """None for a Megatron-Core checkpoint."""


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """A reference to weights that do not change, with an optional adapter, and their identity.

    Two are the same model if their identities are equal, wherever their files are.
    """

    source: ModelSource
    base_identity: str
    """Of the weights without the adapter: a hash that is equal in every layout."""

    adapter: Path | None = None
    """A PEFT directory."""

    adapter_identity: str = ""
    """Of the adapter: likewise."""

    @classmethod
    def of(cls, source: ModelSource) -> Self:
        """The model in these files; reads every byte. Collective."""
        return cls(source, weights_fingerprint(source))

    def with_adapter(self, adapter: Path) -> "FrozenModel":
        """The same weights with a PEFT adapter, every byte of which is read. Collective."""
        files = [path for name in _ADAPTER_FILES if (path := adapter / name).is_file()]
        return FrozenModel(self.source, self.base_identity, adapter, files_fingerprint(files))

    @property
    def identity(self) -> str:
        """sha256 of weights and adapter."""
        if self.adapter is None:
            return self.base_identity
        return hashlib.sha256(f"{self.base_identity} {self.adapter_identity}".encode()).hexdigest()


def open_model(path: str) -> ModelSource:
    """Opens a model. Call within `raise_on_all_ranks`.

    In a run of several processes, `fetch_models` turns hub names into directories before.

    Args:
        path: a Hugging Face directory, a `torch_dist` checkpoint of this package (a snapshot of an
            sDPO step is one), or a hub name, which every caller looks up on the hub.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        directory = download_model(path)
    snapshot = whole_snapshot(directory)
    if snapshot is not None:
        check_names(directory, snapshot)
    if (directory / "metadata.json").is_file():
        companions, architecture = open_companions(directory)
        return ModelSource(directory, architecture, companions, None)
    checkpoint, architecture = open_hf(directory)
    return ModelSource(directory, architecture, checkpoint.companions, checkpoint)


def open_companions(checkpoint: Path) -> tuple[tuple[Path, ...], Architecture]:
    """The configuration and tokenizer files of a Megatron-Core checkpoint, and its architecture.

    Raises:
        UserError: there is no configuration, an unsupported one, or a tokenizer with more tokens
            than the vocabulary.
    """
    companions = companion_files(checkpoint)
    path = checkpoint / COMPANIONS / CONFIG_FILE
    architecture = read_architecture(read_json_object(path), path)
    check_vocabulary(path.parent, architecture.vocab_size)
    return tuple(companions), architecture


def load_base(
    source: ModelSource, chunks: Sequence[GPTModel], *, show_progress: bool = False
) -> None:
    """Fills this rank's chunks. Collective.

    Raises:
        CheckpointError: on every rank; a file is damaged, or a value too large for the dtype.
    """
    if source.hf is None:
        load_weights(chunks, source.directory, source.architecture)
    else:
        load_hf_weights(chunks, source.hf, source.architecture, show_progress=show_progress)


def weights_fingerprint(source: ModelSource) -> str:
    """sha256 of every byte of the configuration and the weights. Collective.

    The ranks share the files. File names only determine the order, so that a copy elsewhere is the
    same model.

    Raises:
        CheckpointError: on every rank; a file cannot be read, or differs from its snapshot's list.
    """
    files = [path for pattern in _WEIGHT_FILES for path in sorted(source.directory.glob(pattern))]
    files += [path for path in source.companions if path.name == CONFIG_FILE]
    with raise_on_all_ranks("opening the snapshot"):
        snapshot = whole_snapshot(source.directory)
    if snapshot is None:
        return files_fingerprint(files)
    check_snapshot(source.directory, snapshot)
    names = [str(path.relative_to(source.directory)) for path in files]
    return _combined([snapshot.files[name] for name in names])


def check_snapshot(directory: Path, snapshot: Snapshot) -> None:
    """Compares every file of a snapshot, byte by byte, with its list of hashes. Collective.

    Raises:
        CheckpointError: on every rank; a file is missing, was added or changed, or is unreadable.
    """
    with raise_on_all_ranks("listing the snapshot's files"):
        check_names(directory, snapshot)
    digests = file_digests([directory / name for name in snapshot.files])
    with raise_on_all_ranks("checking the snapshot"):
        check_digests(directory, snapshot, digests)


def files_fingerprint(files: Sequence[Path]) -> str:
    """sha256 of the bytes of files in this order; the ranks share the files. Collective.

    Raises:
        CheckpointError: on every rank; a file cannot be read.
    """
    return _combined(file_digests(files))


def file_digests(files: Sequence[Path]) -> list[str]:
    """The sha256 of each file; the ranks share the files. Collective.

    Raises:
        CheckpointError: on every rank; a file cannot be read.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    with raise_on_all_ranks("reading the model's files"):
        mine = {index: file_digest(files[index]) for index in range(rank, len(files), size)}
    digests = {index: digest for part in all_gather_objects(mine) for index, digest in part.items()}
    return [digests[index] for index in range(len(files))]


def _combined(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
