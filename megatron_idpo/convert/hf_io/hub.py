"""Models of the Hugging Face hub: downloaded once per machine, and once for a shared cache."""

import re
import socket
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    broadcast_from_rank0,
    raise_on_all_ranks,
)

_HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.model.v3", "*.txt", "*.jinja"]


def fetch_models(paths: Sequence[str]) -> list[str]:
    """The directory of each model on this machine; what is not there is downloaded. Collective.

    Rank 0 resolves hub names to commits and downloads. Then the first rank of every other machine
    does, unless it sees the same cache (`HF_HOME`); all others read the cache only. Without this
    order, 512 processes would each ask the hub for every file, and the commit of a branch could
    change in between.

    Args:
        paths: directories, which are returned as they are, or hub names.

    Raises:
        CheckpointError: on every rank; a model is not on the hub, or the hub cannot be reached.
    """
    hosts = all_gather_objects(socket.gethostname())
    rank = dist.get_rank()
    is_first_here = hosts.index(hosts[rank]) == rank
    fetched: list[str] = list(paths)
    with raise_on_all_ranks("downloading the model"):
        if rank == 0:
            fetched = [_directory(path) for path in paths]
    # A directory of the cache is named after the commit.
    commits = broadcast_from_rank0(lambda: [Path(path).name for path in fetched])
    with raise_on_all_ranks("downloading the model to this machine"):
        if rank > 0 and is_first_here:
            fetched = [_directory(*one) for one in zip(paths, commits, strict=True)]
    with raise_on_all_ranks("opening the downloaded model"):
        if not is_first_here:
            fetched = [_directory(*one, is_here=True) for one in zip(paths, commits, strict=True)]
    return fetched


def _directory(path: str, commit: str | None = None, *, is_here: bool = False) -> str:
    if Path(path).expanduser().is_dir():
        return path
    return str(download_model(path, commit=commit, is_here=is_here))


def download_model(
    name: str, location: str = "model.path", *, commit: str | None = None, is_here: bool = False
) -> Path:
    """The directory of a hub model, downloaded if it is not in the cache. Not collective.

    Args:
        name: on the hub.
        location: of the name, for errors.
        commit: of its repository; None: the newest one, or without network the cached one.
        is_here: whether it is in the cache already: the hub is not asked.

    Raises:
        CheckpointError: at `location`; it is not on the hub, or the hub cannot be reached.
    """
    if not _HUB_MODEL.fullmatch(name):
        remedy = "name a model directory, or a hub model such as organization/model"
        raise CheckpointError.at(location, f"{name} is not a directory", remedy)
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            name, revision=commit, allow_patterns=_HUB_FILES, local_files_only=is_here
        )
    except Exception as error:  # the hub's own errors, and those of four network libraries
        reason = type(error).__name__
        message = f"{name} is not a directory, and cannot be downloaded from the hub ({reason})"
        remedy = f"check the name, or run this on a machine with network: hf download {name}"
        raise CheckpointError.at(location, message, remedy) from error
    return Path(directory)
