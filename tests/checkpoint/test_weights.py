"""Weights through `torch_dist` files: between layouts, dtypes and megatron-core."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import start_layout
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

TP2 = Layout(tensor=2)
PP2_VP2 = Layout(pipeline=2, virtual_pipeline=2)


def chunks_of(layout: Layout, dtype: torch.dtype, **overrides: Any) -> tuple[list[Any], Any]:
    from megatron_idpo.mcore.model.build import ModelOptions, build_model

    architecture = Architecture.from_hf(tiny_hf_config("qwen2", **overrides))
    start_layout(layout)
    return build_model(architecture, layout, ModelOptions(dtype=dtype)), architecture


def value(name: str, parameter: torch.Tensor, salt: int) -> torch.Tensor:
    """Values of a parameter: different for each, equal in every process."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * salt)
    return torch.randn(parameter.shape, generator=generator)


def save(directory: str, layout: Layout, dtype: torch.dtype, salt: int = 0) -> None:
    from megatron_idpo.checkpoint.weights import save_weights
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.mcore.parallel.groups import rank_coordinates

    chunks, _ = chunks_of(layout, dtype)
    with torch.no_grad():
        for name, parameter in global_parameters(chunks):
            rank = 0 if parameter.dim() == 1 and "bias" not in name else rank_coordinates().tp_rank
            parameter.copy_(value(name, parameter, salt + rank))
    before = {name: parameter.clone() for name, parameter in global_parameters(chunks)}
    save_weights(chunks, Path(directory))
    after = dict(global_parameters(chunks))
    assert all(torch.equal(after[name], one) for name, one in before.items())


def load(
    directory: str, layout: Layout, dtype: torch.dtype, **overrides: Any
) -> dict[str, torch.Tensor]:
    from megatron_idpo.checkpoint.weights import load_weights
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, architecture = chunks_of(layout, dtype, **overrides)
    for _, parameter in global_parameters(chunks):
        parameter.data.fill_(torch.nan)
    load_weights(chunks, Path(directory), architecture)
    assert not any(parameter.isnan().any() for _, parameter in global_parameters(chunks))
    return {name: tensor.clone() for name, tensor in whole_tensors(chunks, architecture)}


def merged(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def test_other_layout_and_dtype_load_equal_values(workers, tmp_path):
    workers.run(save, 2, str(tmp_path), TP2, torch.float32)
    same = merged(workers.run(load, 2, str(tmp_path), TP2, torch.float32))
    other = merged(workers.run(load, 2, str(tmp_path), PP2_VP2, torch.float32))
    cast = merged(workers.run(load, 1, str(tmp_path), Layout(), torch.bfloat16))
    assert same.keys() == other.keys() == cast.keys() and len(same) == 4 * 12 + 3
    for name, tensor in same.items():
        assert torch.equal(tensor, other[name])
        assert torch.equal(tensor.bfloat16(), cast[name])


SHARED = 1.2
"""What the archive of each tensor adds, and the difference of two shares, for tiny tensors."""


def test_data_parallel_replicas_write_once_and_read_equal_values(workers, tmp_path):
    workers.run(save, 2, str(tmp_path), Layout(), torch.float32)
    alone = merged(workers.run(load, 1, str(tmp_path), Layout(), torch.float32))
    for replica in workers.run(load, 2, str(tmp_path), Layout(), torch.float32):
        assert all(torch.equal(replica[name], tensor) for name, tensor in alone.items())
    first, second = (path.stat().st_size for path in tmp_path.glob("*.distcp"))
    written = sum(tensor.nbytes for tensor in alone.values())
    assert written <= first + second < SHARED * written
    assert max(first, second) < SHARED * min(first, second)


def test_other_model_is_refused_on_every_rank(workers, tmp_path):
    workers.run(save, 1, str(tmp_path), Layout(), torch.float32)
    with pytest.raises(CheckpointError, match=r"tensor '[\w.]+' has shape \(4,.*expected \(8,"):
        workers.run(load, 2, str(tmp_path), PP2_VP2, torch.float32, num_hidden_layers=8)


def keys(directory: str) -> list[tuple[list[str], list[str]]]:
    from megatron_idpo.checkpoint.stored_weights import stored_weights
    from megatron_idpo.checkpoint.weights import sharded_weights

    chunks, _ = chunks_of(Layout(), torch.float32)
    state = sharded_weights(chunks)
    return sorted(state), sorted(stored_weights(Path(directory)))


def test_files_have_the_layout_of_megatron_core(workers, tmp_path):
    """Keys with stacked layers, and only weights."""
    workers.run(save, 1, str(tmp_path), Layout(), torch.float32)
    ((in_model, in_checkpoint),) = workers.run(keys, 1, str(tmp_path))
    assert "chunk0.decoder.layers.3.mlp.linear_fc1.weight" in in_model
    assert not any("_extra_state" in key for key in in_model + in_checkpoint)
    assert "decoder.layers.mlp.linear_fc1.weight" in in_checkpoint
    assert "decoder.layers.self_attention.linear_qkv.bias" in in_checkpoint
    # 4 layers in one key each: norms, qkv weight and bias, projection, fc1, fc2; 3 around them.
    assert len(in_checkpoint) == 7 + 3
    assert {path.name for path in tmp_path.iterdir()} == {
        ".metadata",
        "metadata.json",
        "__0_0.distcp",
        "checksums.json",
    }


def load_by_megatron_core(directory: str) -> bool:
    """Whether megatron-core's reader loads the same values as ours."""
    from megatron.core import dist_checkpointing

    from megatron_idpo.checkpoint.weights import load_weights
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, architecture = chunks_of(Layout(), torch.float32)
    load_weights(chunks, Path(directory), architecture)
    ours = {name: parameter.clone() for name, parameter in global_parameters(chunks)}
    state = chunks[0].sharded_state_dict()
    loaded = dist_checkpointing.load(state, directory)
    chunks[0].load_state_dict(loaded)
    return all(torch.equal(ours[name], one) for name, one in global_parameters(chunks))


def test_megatron_core_reads_our_files(workers, tmp_path):
    workers.run(save, 2, str(tmp_path), TP2, torch.float32)
    assert workers.run(load_by_megatron_core, 1, str(tmp_path)) == [True]


def save_by_megatron_core(directory: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, architecture = chunks_of(TP2, torch.float32)
    with torch.no_grad():
        for name, parameter in global_parameters(chunks):
            parameter.copy_(value(name, parameter, 0))
    state = chunks[0].sharded_state_dict()
    dist_checkpointing.save(state, directory, async_strategy="mcore")
    return {name: tensor.clone() for name, tensor in whole_tensors(chunks, architecture)}


@pytest.mark.exhaustive  # megatron-core's writer starts a process that imports torch
def test_files_of_megatron_core_are_read(workers, tmp_path):
    written = merged(workers.run(save_by_megatron_core, 2, str(tmp_path)))
    loaded = merged(workers.run(load, 1, str(tmp_path), Layout(), torch.float32))
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def children_before_and_after(directory: str) -> tuple[int, int]:
    import psutil

    before = len(psutil.Process().children())
    save(directory, Layout(), torch.float32)
    return before, len(psutil.Process().children())


def test_no_child_process_is_started(workers, tmp_path):
    ((before, after),) = workers.run(children_before_and_after, 1, str(tmp_path))
    assert after == before
