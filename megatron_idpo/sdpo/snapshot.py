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

import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.convert.megatron_to_hf import whole_tensors
from megatron_idpo.convert.model_source import check_snapshot, file_digests, open_model
from megatron_idpo.errors import CheckpointError
from megatron_idpo.lora.merge import merge_for_good
from megatron_idpo.lora.peft import save_peft, whole_adapter_tensors
from megatron_idpo.mcore.parallel.world import from_first, is_first_rank, raise_on_all_ranks
from megatron_idpo.sdpo.tensor_identity import tensors_identity
from megatron_idpo.train.build import Policy
from megatron_idpo.train.export import companions_of

_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def write_snapshot(config: RunConfig, policy: Policy, directory: Path, *, carry: bool) -> Snapshot:
    """Write what training has made of a policy. Collective; the last thing that is done with it.

    Adapters that are not carried are merged into the policy's own weights. A snapshot that is there
    already, of an end that was not recorded, is replaced.

    Args:
        config: of the step: its chat template goes along; for PEFT, where the first model is.
        policy: trained.
        directory: the snapshot's.
        carry: write the adapter alone.

    Raises:
        CheckpointError: on every rank; it cannot be written, and nothing is left behind.
    """
    with new_directory(directory, marker=FILE, overwrite=True) as incomplete:
        tensors, base = _fill(config, policy, incomplete, directory, carry=carry)
        listed: dict[str, int] = {}
        with raise_on_all_ranks("listing the snapshot's files"):
            if is_first_rank():
                listed = _sizes(incomplete)
        sizes = from_first(lambda: listed)
        digests = file_digests([incomplete / name for name in sizes])
        snapshot = Snapshot(
            identity=_identity(policy.start, tensors, carry=carry),
            tensors=tensors,
            base=base,
            files=dict(zip(sizes, digests, strict=True)),
            total_bytes=sum(sizes.values()),
        )
        with raise_on_all_ranks("finishing the snapshot"):
            if is_first_rank():
                write_description(incomplete, snapshot)
                _protect(incomplete / name for name in (*sizes, FILE))
    return snapshot


def open_snapshot(directory: Path, identity: str, first: FrozenModel) -> FrozenModel:
    """A snapshot as a model, every byte of it checked. Collective.

    Args:
        directory: the snapshot's.
        identity: what it has to be.
        first: the first model, on which a carried adapter lies.

    Raises:
        CheckpointError: on every rank; there is none, it is another one, or a file was changed or
            added.
    """
    with raise_on_all_ranks("opening the snapshot"):
        snapshot = read_snapshot(directory)
        if snapshot.identity != identity:
            message = (
                f"is another snapshot ({snapshot.identity[:12]}) than the run's manifest names "
            )
            raise CheckpointError.at(
                str(directory / FILE), f"{message}({identity[:12]})", remedy(directory)
            )
    check_snapshot(directory, snapshot)
    with raise_on_all_ranks("looking at the snapshot's model"):
        if snapshot.base is None:
            return FrozenModel(open_model(str(directory)), snapshot.tensors)
        assert snapshot.base == first.base_identity, "the manifest has compared the first model"
        return FrozenModel(first.source, first.base_identity, directory / ADAPTER, snapshot.tensors)


def _fill(
    config: RunConfig, policy: Policy, incomplete: Path, directory: Path, *, carry: bool
) -> tuple[str, str | None]:
    """Write the tensors; returns their identity and that of what they lie on."""
    source, adapters = policy.source, policy.adapters
    if carry:
        assert adapters is not None, "the configuration was checked"
        where, base_model = incomplete / ADAPTER, config.model.path
        save_peft(adapters, source.architecture, where, base_model=base_model)
        return tensors_identity(whole_adapter_tensors(adapters)), policy.start.base_identity
    if adapters is not None:
        merge_for_good(adapters)
    save_weights(policy.chunks, incomplete, location=directory)
    with (
        companions_of(config, source) as companions,
        raise_on_all_ranks("copying the configuration and the tokenizer"),
    ):
        if is_first_rank():
            copy_companions(companions, incomplete / COMPANIONS)
    return tensors_identity(whole_tensors(policy.chunks, source.architecture)), None


def _identity(start: FrozenModel, tensors: str, *, carry: bool) -> str:
    if not carry:
        return tensors
    return FrozenModel(start.source, start.base_identity, Path(ADAPTER), tensors).identity


def _sizes(directory: Path) -> dict[str, int]:
    """Every file's bytes, by its path in the snapshot."""
    names = files_below(directory)
    try:
        return {name: (directory / name).stat().st_size for name in names}
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise CheckpointError.at(str(error.filename or directory), message) from None


def _protect(files: Iterable[Path]) -> None:
    """Take the right to write away; against slips, where the file system knows rights."""
    for path in files:
        with suppress(OSError):
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_WRITE)
