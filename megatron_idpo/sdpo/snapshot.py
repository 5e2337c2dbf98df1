"""Snapshots: the immutable result of a step, which the next step starts from or compares to.

    SNAPSHOT/
      snapshot.json                       identity, and the hash of every file (sealed)
      metadata.json .metadata __*.distcp  all weights, adapters merged: a `torch_dist` checkpoint
      huggingface/                        configuration and tokenizer, as `convert` writes them
    or, with `sdpo.adapters: carry`,
      adapter/                            the adapter in PEFT's files, for the first model

Both are independent of the layout they were written in. The identity is a hash of the tensors. It
is equal in all layouts and part of the fingerprint of reference caches. Equal saves may differ in
their files, so the files' hashes only detect changes; they identify nothing.
"""

import hashlib
import logging
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from megatron_idpo.checkpoint.model_directory import COMPANIONS, copy_companions, new_directory
from megatron_idpo.checkpoint.snapshot_metadata import (
    ADAPTER,
    FILE,
    Snapshot,
    files_below,
    read_snapshot,
    remedy,
    write_description,
)
from megatron_idpo.checkpoint.weights import save_weights
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.megatron_to_hf import whole_tensors
from megatron_idpo.convert.model_source import FrozenModel, check_snapshot, file_digests, open_model
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.adapters import KEPT_SHARE, merge_in_place, surviving_share
from megatron_idpo.lora.peft import save_peft, whole_adapter_tensors
from megatron_idpo.mcore.parallel.world import (
    all_gather_objects,
    broadcast_from_rank0,
    is_rank0,
    raise_on_all_ranks,
)
from megatron_idpo.train.export import companions_of
from megatron_idpo.train.policy import Policy

logger = logging.getLogger(__name__)

_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def write_snapshot(config: RunConfig, policy: Policy, directory: Path, *, carry: bool) -> Snapshot:
    """Write a trained policy. Collective; the policy must not be used afterwards.

    Unless they are carried, adapters are merged into the policy's own weights. An existing snapshot
    that the manifest does not record, because the run was killed before, is replaced.

    Args:
        config: of the step: its chat template, and for PEFT the path of the first model.
        policy: trained.
        directory: of the snapshot.
        carry: write the adapter alone.

    Raises:
        CheckpointError: on every rank; it cannot be written, and no incomplete snapshot is left.
    """
    with new_directory(directory, marker=FILE, overwrite=True) as incomplete:
        tensors, base = _write_tensors(config, policy, incomplete, directory, carry=carry)
        own_sizes: dict[str, int] = {}
        with raise_on_all_ranks("listing the snapshot's files"):
            if is_rank0():
                own_sizes = _file_sizes(incomplete)
        sizes = broadcast_from_rank0(lambda: own_sizes)
        digests = file_digests([incomplete / name for name in sizes])
        identity = tensors
        if carry:
            start = policy.start
            carried = FrozenModel(start.source, start.base_identity, Path(ADAPTER), tensors)
            identity = carried.identity
        snapshot = Snapshot(
            identity=identity,
            tensors=tensors,
            base=base,
            files=dict(zip(sizes, digests, strict=True)),
            total_bytes=sum(sizes.values()),
        )
        with raise_on_all_ranks("finishing the snapshot"):
            if is_rank0():
                write_description(incomplete, snapshot)
                _make_read_only(incomplete / name for name in (*sizes, FILE))
    return snapshot


def open_snapshot(directory: Path, identity: str, first: FrozenModel) -> FrozenModel:
    """Check every byte of a snapshot and open it as a model. Collective.

    Args:
        directory: of the snapshot.
        identity: the expected one.
        first: the first model, which a carried adapter belongs to.

    Raises:
        CheckpointError: on every rank; there is none, it is another one, or a file was changed or
            added.
    """
    with raise_on_all_ranks("opening the snapshot"):
        snapshot = read_snapshot(directory)
        if snapshot.identity != identity:
            raise CheckpointError.at(
                str(directory / FILE),
                f"snapshot {snapshot.identity[:12]} is not the one in the run's manifest "
                f"({identity[:12]})",
                remedy(directory),
            )
    check_snapshot(directory, snapshot)
    with raise_on_all_ranks("opening the snapshot's model"):
        if snapshot.base is None:
            return FrozenModel(open_model(str(directory)), snapshot.tensors)
        assert snapshot.base == first.base_identity, "compared by the manifest"
        return FrozenModel(first.source, first.base_identity, directory / ADAPTER, snapshot.tensors)


def tensors_identity(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of name, dtype, shape and bytes of every tensor, sorted by name; equal in all layouts.

    Collective over the world: an all-gather of one small object, after this rank has iterated over
    its tensors, which may be collective over its model-parallel groups.

    Args:
        tensors: whole tensors under global names, each from one rank.
    """
    own: dict[str, str] = {}
    for name, tensor in tensors:
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(memoryview(flat.numpy())).hexdigest()
        own[name] = f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}\n"
    lines = {name: line for rank in all_gather_objects(own) for name, line in rank.items()}
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def _write_tensors(
    config: RunConfig, policy: Policy, incomplete: Path, directory: Path, *, carry: bool
) -> tuple[str, str | None]:
    """Returns the identity of the tensors, and of the model that a carried adapter belongs to."""
    source, adapters = policy.source, policy.adapters
    if carry:
        assert adapters is not None, "checked with the configuration"
        # A snapshot stays in the run, which may be opened from another directory.
        base_model = config.model.path
        if Path(base_model).is_dir():
            base_model = str(Path(base_model).absolute())
        save_peft(adapters, source.architecture, incomplete / ADAPTER, base_model=base_model)
        return tensors_identity(whole_adapter_tensors(adapters)), policy.start.base_identity
    if adapters is not None:
        share = surviving_share(adapters, config.model.torch_dtype())
        if share < KEPT_SHARE and is_rank0():
            message = "merged weights have %.0f %% of the adapter's change: %s rounds the rest "
            message += "away; sdpo.adapters: carry keeps all of it"
            logger.warning(message, 100 * share, config.model.dtype)
        merge_in_place(adapters)
    save_weights(policy.chunks, incomplete, location=directory)
    with (
        companions_of(config, source) as companions,
        raise_on_all_ranks("copying the configuration and the tokenizer"),
    ):
        if is_rank0():
            copy_companions(companions, incomplete / COMPANIONS)
    tensors = whole_tensors(policy.chunks, source.architecture, every_replica=False)
    return tensors_identity(tensors), None


def _file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file, by its path in the snapshot."""
    with CheckpointError.on_os_error(str(directory), "cannot be read"):
        return {name: (directory / name).stat().st_size for name in files_below(directory)}


def _make_read_only(files: Iterable[Path]) -> None:
    """Protect files from accidental writes, if the file system has permissions."""
    for path in files:
        with suppress(OSError):
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_WRITE)
