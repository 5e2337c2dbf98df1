"""A step's result, written once and never changed: the next step's reference and starting point.

    SNAPSHOT/
      snapshot.json                       what it is, and every file's hash (sealed.py)
      metadata.json .metadata __*.distcp  all weights, adapters merged in: a `torch_dist` checkpoint
      huggingface/                        configuration and tokenizer, as `convert` writes them
    or, where adapters are carried on,
      adapter/                            the adapter in PEFT's files, for the first model

Either is independent of the layout it was written in. The identity is a hash of the tensors, the
same in every layout, and goes into the fingerprints of reference caches; the files' hashes notice a
changed byte. A checkpoint's files differ between equal saves, so they identify nothing.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.checkpoint.directory import COMPANIONS, copy_companions, new_directory
from megatron_idpo.checkpoint.weights import save_weights
from megatron_idpo.convert.fixed_model import FixedModel
from megatron_idpo.convert.megatron_to_hf import whole_tensors
from megatron_idpo.convert.model_source import file_digests, open_model
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.merge import merge_for_good
from megatron_idpo.lora.peft import save_peft, whole_adapter_tensors
from megatron_idpo.mcore.world import agreeing, from_first, is_first_rank
from megatron_idpo.sdpo.identity import tensors_identity
from megatron_idpo.sdpo.snapshot_file import (
    FILE,
    Snapshot,
    read_snapshot,
    remedy,
    write_description,
)

if TYPE_CHECKING:
    from megatron_idpo.train.build import Policy

ADAPTER = "adapter"
_READ_ONLY = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


def write_snapshot(policy: "Policy", directory: Path, *, carry: bool, base_model: str) -> Snapshot:
    """Write what training has made of a policy. Collective; the last thing that is done with it.

    Adapters that are not carried are merged into the policy's own weights. A snapshot that is there
    already, of an end that was not recorded, is replaced.

    Args:
        policy: trained.
        directory: the snapshot's.
        carry: write the adapter alone.
        base_model: the first model's directory or hub name, for PEFT.

    Raises:
        CheckpointError: on every rank; it cannot be written, and nothing is left behind.
    """
    with new_directory(directory, marker=FILE, overwrite=True) as incomplete:
        tensors, base = _fill(policy, incomplete, directory, carry=carry, base_model=base_model)
        with agreeing("listing the snapshot's files"):
            files = from_first(lambda: _files(incomplete))
        digests = file_digests([incomplete / name for name in files])
        snapshot = Snapshot(
            identity=_identity(policy.start, tensors, carry=carry),
            tensors=tensors,
            base=base,
            files=dict(zip(files, digests, strict=True)),
            total_bytes=sum((incomplete / name).stat().st_size for name in files),
        )
        with agreeing("finishing the snapshot"):
            if is_first_rank():
                write_description(incomplete, snapshot)
                _protect([incomplete / name for name in (*files, FILE)])
    return snapshot


def open_snapshot(directory: Path, identity: str, first: FixedModel) -> FixedModel:
    """A snapshot as a model, every byte of it checked. Collective.

    Args:
        directory: the snapshot's.
        identity: what it has to be.
        first: the first model, on which a carried adapter lies.

    Raises:
        CheckpointError: on every rank; there is none, it is another one, or a file was changed.
    """
    with agreeing("opening the snapshot"):
        snapshot = read_snapshot(directory)
        if snapshot.identity != identity:
            told = f"is another snapshot ({snapshot.identity[:12]}) than the run's manifest names "
            raise CheckpointError.at(
                str(directory / FILE), f"{told}({identity[:12]})", remedy(directory)
            )
        for name in snapshot.files:
            if not (directory / name).is_file():
                raise CheckpointError.at(str(directory / name), "is missing", remedy(directory))
    digests = file_digests([directory / name for name in snapshot.files])
    with agreeing("checking the snapshot"):
        for (name, sha256), found in zip(snapshot.files.items(), digests, strict=True):
            if sha256 != found:
                told = "has been changed since it was written"
                raise CheckpointError.at(str(directory / name), told, remedy(directory))
        if snapshot.base is None:
            return FixedModel(open_model(str(directory)), snapshot.tensors)
        assert snapshot.base == first.base_identity, "the manifest has compared the first model"
        return FixedModel(first.source, first.base_identity, directory / ADAPTER, snapshot.tensors)


def _fill(
    policy: "Policy", incomplete: Path, directory: Path, *, carry: bool, base_model: str
) -> tuple[str, str | None]:
    """Write the tensors; returns their identity and that of what they lie on."""
    source, adapters = policy.source, policy.adapters
    if carry:
        assert adapters is not None, "the configuration was checked"
        save_peft(adapters, source.architecture, incomplete / ADAPTER, base_model=base_model)
        return tensors_identity(whole_adapter_tensors(adapters)), policy.start.base_identity
    if adapters is not None:
        merge_for_good(adapters)
    save_weights(policy.chunks, incomplete, place=directory)
    with agreeing("copying the configuration and the tokenizer"):
        if is_first_rank():
            copy_companions(source.companions, incomplete / COMPANIONS)
    return tensors_identity(whole_tensors(policy.chunks, source.architecture)), None


def _identity(start: FixedModel, tensors: str, *, carry: bool) -> str:
    if not carry:
        return tensors
    return FixedModel(start.source, start.base_identity, Path(ADAPTER), tensors).identity


def _files(directory: Path) -> list[str]:
    """Every file below a directory, by its path in it."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )


def _protect(files: Sequence[Path]) -> None:
    """Take the right to write away; against slips, where the file system knows rights."""
    for path in files:
        os.chmod(path, _READ_ONLY)
