"""Models of the Hugging Face hub: downloaded once per machine, and once for a shared cache."""

import re
import socket
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_idpo.convert.hf_io.tokenizer_files import LICENSE_FILES
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    broadcast_from_rank0,
    raise_on_all_ranks,
)

_HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("*.json", "*.model", "*.model.v3", "*.txt", "*.jinja")
_HUB_FILES = ("*.safetensors", *_TOKENIZER_FILES, "README.md", *LICENSE_FILES)
"""The model card has the license, which the card of a trained model inherits."""


def fetch_tokenizer(path: str | None) -> str | None:
    """The directory of a tokenizer on this machine; `fetch_models` without weights. Collective.

    Args:
        path: of a directory or a file, which is returned as it is, or a hub name; None: None.

    Raises:
        CheckpointError: as `fetch_models`.
    """
    if path is None or path.endswith(".model") or not _HUB_MODEL.fullmatch(path):
        return path
    return fetch_models([path], location="model.tokenizer", files=_TOKENIZER_FILES)[0]


def fetch_models(
    paths: Sequence[str], *, location: str = "model.path", files: Sequence[str] = _HUB_FILES
) -> list[str]:
    """The directory of each model on this machine; what is not there is downloaded. Collective.

    Rank 0 resolves hub names to commits and downloads. Then the first rank of every other machine
    does, unless it sees the same cache (`HF_HOME`); all others read the cache only. Without this
    order, 512 processes would each ask the hub for every file, and the commit of a branch could
    change in between.

    Args:
        paths: directories, which are returned as they are, or hub names.
        location: of the paths, for errors.
        files: patterns of what is downloaded.

    Raises:
        CheckpointError: on every rank; a model is not on the hub, or the hub cannot be reached.
    """
    hosts = all_gather_objects(socket.gethostname())
    rank = dist.get_rank()
    is_first_here = hosts.index(hosts[rank]) == rank

    def directory(path: str, commit: str | None = None, *, is_here: bool = False) -> str:
        if Path(path).expanduser().is_dir():
            return path
        return str(download_model(path, location, commit=commit, is_here=is_here, files=files))

    fetched: list[str] = list(paths)
    with raise_on_all_ranks(f"downloading {location}"):
        if rank == 0:
            fetched = [directory(path) for path in paths]
    # A directory of the cache is named after the commit.
    commits = broadcast_from_rank0(lambda: [Path(path).name for path in fetched])
    with raise_on_all_ranks(f"downloading {location} to this machine"):
        if rank > 0 and is_first_here:
            fetched = [directory(*one) for one in zip(paths, commits, strict=True)]
    with raise_on_all_ranks(f"opening the downloaded {location}"):
        if not is_first_here:
            fetched = [directory(*one, is_here=True) for one in zip(paths, commits, strict=True)]
    return fetched


def download_model(
    name: str,
    location: str = "model.path",
    *,
    commit: str | None = None,
    is_here: bool = False,
    files: Sequence[str] = _HUB_FILES,
) -> Path:
    """The directory of a hub model, downloaded if it is not in the cache. Not collective.

    Args:
        name: on the hub.
        location: of the name, for errors.
        commit: of its repository; None: the newest one, or without network the cached one.
        is_here: whether it is in the cache already: the hub is not asked.
        files: patterns of what is downloaded.

    Raises:
        CheckpointError: at `location`; it is not on the hub, or the hub cannot be reached.
    """
    if not _HUB_MODEL.fullmatch(name):
        remedy = "name a model directory, or a hub model such as organization/model"
        raise CheckpointError.at(location, f"{name} is not a directory", remedy)
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            name, revision=commit, allow_patterns=list(files), local_files_only=is_here
        )
    except Exception as error:  # the hub's own errors, and those of four network libraries
        reason = type(error).__name__
        message = f"{name} is not a directory, and cannot be downloaded from the hub ({reason})"
        remedy = f"check the name, or run this on a machine with network: hf download {name}"
        raise CheckpointError.at(location, message, remedy) from error
    return Path(directory)
