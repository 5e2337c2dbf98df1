"""Data-parallel ranks share the reading of what all of them need, and exchange it."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

pytestmark = pytest.mark.distributed

SIZES = [7, 1, 1, 5, 3, 2, 2, 2, 1]


def readers(size: int) -> list[int]:
    from megatron_idpo.mcore.parallel.replicas import Replicas

    group: Any = None
    return Replicas(group, 0, size).readers(SIZES)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_every_part_has_a_reader_and_all_read_about_as_much(size):
    loads = [0] * size
    for part, reader in zip(SIZES, readers(size), strict=True):
        loads[reader] += part
    assert sum(loads) == sum(SIZES)
    # Largest part first is at most 4/3 of the best assignment, which has at least the mean.
    assert max(loads) <= max(4 / 3 * sum(SIZES) / size, max(SIZES))


def exchange() -> list[torch.Tensor]:
    """Parts of several dtypes and alignments; every rank fills its own ones only."""
    import torch.distributed as dist

    from megatron_idpo.mcore.parallel.replicas import Replicas

    rank, size = dist.get_rank(), dist.get_world_size()
    replicas = Replicas(dist.group.WORLD, rank, size)
    kinds = (torch.bfloat16, torch.float32, torch.uint8, torch.bfloat16)
    wholes = [torch.zeros(5, 3 + index).to(kinds[index % 4]) for index in range(8)]
    # A column block is not contiguous; a buffer larger than a bucket is sent alone.
    parts = [whole[:, 1:] if index % 2 else whole for index, whole in enumerate(wholes)]
    for index, part in enumerate(parts):
        if index % size == rank:
            part.copy_(torch.arange(part.numel()).view(part.shape) + index)
    with mock.patch("megatron_idpo.mcore.parallel.replicas._BUCKET_BYTES", 60):
        replicas.exchange((index % size, part) for index, part in enumerate(parts))
    return wholes


def test_exchange_copies_every_part_to_all_ranks(workers):
    (alone,) = workers.run(exchange, 1)
    for wholes in workers.run(exchange, 3):
        for got, expected in zip(wholes, alone, strict=True):
            assert torch.equal(got, expected) and got.dtype == expected.dtype


# --- models -----------------------------------------------------------------------------------


def read_model(hf: str, megatron: str, layout: Layout) -> dict[str, tuple[int, int, bool]]:
    """For both formats: bytes that this rank reads; the same alone; whether weights are equal."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.dcp_io import Reader
    from megatron_idpo.checkpoint.weights import load_weights, save_weights
    from megatron_idpo.convert.hf_io.reader import HfCheckpoint
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.mcore.model.build import ModelOptions, build_model, global_parameters
    from megatron_idpo.mcore.parallel.groups import start_layout, stop_layout
    from megatron_idpo.mcore.parallel.replicas import Replicas

    checkpoint, architecture = open_hf(Path(hf))
    start_layout(layout)
    chunks = build_model(architecture, layout, ModelOptions(dtype=torch.bfloat16))
    parameters = [parameter.data for _, parameter in global_parameters(chunks)]
    read_bytes = [0]
    hf_read, dcp_read = HfCheckpoint.read, Reader.read_data

    def counted_hf(*arguments: Any, **options: Any) -> torch.Tensor:
        values = hf_read(*arguments, **options)
        read_bytes[0] += values.numel() * 2  # in bf16, as in memory
        return values

    def counted_dcp(self: Reader, plan: Any, planner: Any) -> Any:
        pieces = {item.storage_index: item for item in plan.items}
        sizes = (self.storage_data[piece].length for piece in pieces)
        read_bytes[0] += sum(sizes)
        return dcp_read(self, plan, planner)

    def loaded(load: Any) -> tuple[int, int, bool]:
        weights = []
        for running in (Replicas.running, lambda is_expert: Replicas(dist.group.WORLD, 0, 1)):
            for parameter in parameters:
                parameter.fill_(torch.nan)
            read_bytes[0] = 0
            with mock.patch.object(Replicas, "running", running):
                load()
            weights.append((read_bytes[0], [parameter.clone() for parameter in parameters]))
        (shared_bytes, shared), (all_bytes, own) = weights
        return shared_bytes, all_bytes, all(map(torch.equal, shared, own))

    with (
        mock.patch.object(HfCheckpoint, "read", counted_hf),
        mock.patch.object(Reader, "read_data", counted_dcp),
        # Blocks of a real model are as small compared to it.
        mock.patch("megatron_idpo.convert.slicing._BLOCK_BYTES", 4096),
    ):
        results = {"hf": loaded(lambda: load_hf_weights(chunks, checkpoint, architecture))}
        save_weights(chunks, Path(megatron))
        results["megatron"] = loaded(lambda: load_weights(chunks, Path(megatron), architecture))
    stop_layout()
    return results


LAYOUTS = {
    "DP4": ("llama", Layout(), 4),
    "TP2-DP2": ("llama", Layout(tensor=2), 4),
    "PP2-CP2": ("llama", Layout(pipeline=2, context=2), 4),
    "EP2-DP4": ("mixtral", Layout(expert=2), 4),
}

UNEVEN = 1.25
"""Most bytes of a rank over the mean of its replicas: parts of the tiny model are not small."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        family: str(write_tiny_hf_model(root / family, family)) for family in ("llama", "mixtral")
    }


@pytest.mark.parametrize(("family", "layout", "size"), LAYOUTS.values(), ids=LAYOUTS)
def test_replicas_share_the_reading_of_a_model(workers, models, tmp_path, family, layout, size):
    """Same weights, bit for bit; a rank reads its share of the bytes."""
    ranks = workers.run(read_model, size, models[family], str(tmp_path), layout)
    replicas = size // layout.expert_model_ranks if layout.expert > 1 else size // layout.tensor
    replicas //= layout.pipeline
    for kind in ("hf", "megatron"):
        shared, alone, is_equal = zip(*(rank[kind] for rank in ranks), strict=True)
        assert all(is_equal), f"{kind}: other weights"
        assert max(shared) <= UNEVEN * max(alone) / replicas, (kind, shared, alone)
