"""A model to start from, wherever it is: a Hugging Face directory, the hub, our own checkpoint.

`open_model` looks at configuration and headers only, so that everything about a run can be checked
before a weight is read; `load_base` then fills this rank's chunks.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_idpo.checkpoint.model_directory import COMPANIONS, companion_files
from megatron_idpo.checkpoint.snapshot_metadata import (
    Snapshot,
    check_digests,
    check_names,
    file_digest,
    whole_snapshot,
)
from megatron_idpo.checkpoint.weights import load_weights
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.tokenizer_files import (
    CONFIG_FILE,
    check_vocabulary,
    read_json_object,
)
from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.parallel.world import gathered, raise_on_all_ranks

_WEIGHT_FILES = ("*.safetensors", "*.distcp", ".metadata")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.model.v3", "*.txt", "*.jinja"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint that has been looked at, but not read."""

    directory: Path
    architecture: Architecture
    companions: tuple[Path, ...]
    """Configuration and tokenizer files, which go along with what is exported."""

    hf: HfCheckpoint | None
    """None for a Megatron-Core checkpoint."""


def open_model(path: str) -> ModelSource:
    """Open a model. Call within `raise_on_all_ranks`; a hub model is downloaded if not cached.

    Args:
        path: a Hugging Face directory, a `torch_dist` checkpoint of ours (a snapshot too), or a
            hub name.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        directory = _from_hub(path)
    snapshot = whole_snapshot(directory)
    if snapshot is not None:
        check_names(directory, snapshot)
    if (directory / "metadata.json").is_file():
        companions = companion_files(directory)
        config = directory / COMPANIONS / CONFIG_FILE
        architecture = Architecture.from_hf(read_json_object(config), str(config))
        check_vocabulary(directory / COMPANIONS, architecture.vocab_size)
        return ModelSource(directory, architecture, tuple(companions), None)
    checkpoint, architecture = open_hf(directory)
    return ModelSource(directory, architecture, checkpoint.companions, checkpoint)


def load_base(
    source: ModelSource, chunks: Sequence[GPTModel], *, show_progress: bool = False
) -> None:
    """Fill this rank's chunks. Collective.

    Raises:
        CheckpointError: on every rank; a file is damaged, or a value too large for the format.
    """
    if source.hf is None:
        load_weights(chunks, source.directory, source.architecture)
    else:
        load_hf_weights(chunks, source.hf, source.architecture, show_progress=show_progress)


def weights_fingerprint(source: ModelSource) -> str:
    """sha256 over every byte of the configuration and the weights. Collective.

    Ranks share the files out between them; names count only as an order, so that a copy elsewhere
    is the same model.

    Raises:
        CheckpointError: on every rank; a file cannot be read, or is not what its snapshot lists.
    """
    files = [path for pattern in _WEIGHT_FILES for path in sorted(source.directory.glob(pattern))]
    files += [path for path in source.companions if path.name == CONFIG_FILE]
    with raise_on_all_ranks("opening the snapshot"):
        snapshot = whole_snapshot(source.directory)
    if snapshot is None:
        return files_fingerprint(files)
    check_snapshot(source.directory, snapshot)
    names = [str(path.relative_to(source.directory)) for path in files]
    return _together([snapshot.files[name] for name in names])


def check_snapshot(directory: Path, snapshot: Snapshot) -> None:
    """Compare every file of a snapshot, and every byte, with what it lists. Collective.

    Raises:
        CheckpointError: on every rank; a file is missing, was added or changed, or is unreadable.
    """
    with raise_on_all_ranks("looking at the snapshot's files"):
        check_names(directory, snapshot)
    digests = file_digests([directory / name for name in snapshot.files])
    with raise_on_all_ranks("checking the snapshot"):
        check_digests(directory, snapshot, digests)


def files_fingerprint(files: Sequence[Path]) -> str:
    """sha256 over the bytes of files in this order, which ranks share out. Collective.

    Raises:
        CheckpointError: on every rank; a file cannot be read.
    """
    return _together(file_digests(files))


def file_digests(files: Sequence[Path]) -> list[str]:
    """Each file's sha256. Collective: ranks share the files out between them.

    Raises:
        CheckpointError: on every rank; a file cannot be read.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    with raise_on_all_ranks("reading the model's files"):
        digests = {
            number: file_digest(path) for number, path in enumerate(files) if number % size == rank
        }
    message = {number: digest for part in gathered(digests) for number, digest in part.items()}
    return [message[number] for number in sorted(message)]


def _together(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _from_hub(name: str) -> Path:
    """The snapshot of a hub model, downloaded where it is not in the cache."""
    if not _HUB_NAME.fullmatch(name):
        remedy = "give a model's directory, or a hub name such as organisation/model"
        raise CheckpointError.at("model.path", f"{name} is no directory", remedy)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's own errors, and those of four network libraries
        message = f"{name} is no directory, and the hub cannot give it ({type(error).__name__})"
        remedy = f"check the name, or fetch it where there is a network: hf download {name}"
        raise CheckpointError.at("model.path", message, remedy) from error
