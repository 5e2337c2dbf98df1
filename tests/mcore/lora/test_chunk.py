"""Adapters of a chunk in checkpoints and under recomputation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

PP2_VP2 = Layout(pipeline=2, virtual_pipeline=2)
TP2_SP = Layout(tensor=2, sequence_parallel=True)
SETTINGS = LoraConfig(rank=4)


def build(layout: Layout, settings: LoraConfig = SETTINGS, **options: Any) -> tuple[Any, Any]:
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model, global_parameters
    from megatron_idpo.mcore.parallel.groups import start_layout

    architecture = Architecture.from_hf(tiny_hf_config("qwen2"))
    start_layout(layout, seed=1)
    chunks = build_model(architecture, layout, ModelOptions(**options))
    for name, parameter in global_parameters(chunks):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return chunks, add_adapters(chunks, architecture, settings)


def full_adapters(adapters: Any) -> dict[str, Tensor]:
    """This stage's unsharded adapters, on its first tensor-parallel rank."""
    from megatron_idpo.mcore.parallel.groups import gather_tensor_shards

    full = {}
    for tensor in adapters.tensors():
        shards = gather_tensor_shards(tensor.parameter.detach())
        if shards is not None:
            split = tensor.split_dim
            full[tensor.name] = (shards[0] if split is None else torch.cat(shards, split)).clone()
    return full


def save(directory: str, layout: Layout) -> dict[str, Tensor]:
    """Save only the adapters, with megatron-core."""
    from megatron.core import dist_checkpointing

    from megatron_idpo.mcore.parallel.groups import rank_coordinates

    chunks, adapters = build(layout)
    for tensor in adapters.tensors():
        rank = 0 if tensor.split_dim is None else rank_coordinates().tp_rank
        generator = torch.Generator().manual_seed(sum(tensor.name.encode()) * 2 + rank)
        tensor.parameter.data.copy_(torch.randn(tensor.parameter.shape, generator=generator))
    dist_checkpointing.save(_sharded(chunks), directory)
    return full_adapters(adapters)


def _sharded(chunks: Any) -> dict[str, Any]:
    return {
        f"{index}.{key}": value
        for index, chunk in enumerate(chunks)
        for key, value in chunk.sharded_state_dict().items()
        if key.startswith("lora.")
    }


def load(directory: str, layout: Layout) -> dict[str, Tensor]:
    from megatron.core import dist_checkpointing

    chunks, adapters = build(layout)
    for _, parameter in adapters.parameters():
        parameter.data.fill_(torch.nan)
    state = _sharded(chunks)
    parameters = {key: value.data for key, value in state.items()}
    loaded = dist_checkpointing.load(state, directory)
    for key, tensor in loaded.items():
        parameters[key].data.copy_(tensor)
    return full_adapters(adapters)


def merged(stages: Any) -> dict[str, Tensor]:
    return {name: tensor for stage in stages for name, tensor in stage.items()}


@pytest.fixture(scope="module")
def saved(workers, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of adapters that was saved with TP2, and their tensors."""
    directory = tmp_path_factory.mktemp("adapters")
    return directory, merged(workers.run(save, 2, str(directory), TP2_SP))


@pytest.mark.parametrize("layout", [Layout(), PP2_VP2])
def test_adapters_load_into_another_layout(layout, workers, saved):
    directory, tensors = saved
    loaded = merged(workers.run(load, layout.model_ranks, str(directory), layout))
    assert loaded.keys() == tensors.keys() and len(tensors) == 4 * 7 * 2
    assert all(torch.equal(tensors[name], tensor) for name, tensor in loaded.items())


def sharded_names(layout: Layout) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_idpo.checkpoint.weights import sharded_weights
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, adapters = build(layout)
    names = {id(parameter): name for name, parameter in adapters.parameters()}
    state = _sharded(chunks)
    assert all(names[id(value.data)] == value.key for value in state.values())
    base_names = [name for name, _ in global_parameters(chunks)]
    with_adapters = sorted(sharded_weights(chunks))
    adapters.remove()
    assert base_names == [name for name, _ in global_parameters(chunks)]
    assert with_adapters == sorted(sharded_weights(chunks))
    return {value.key: is_main_replica(value.replica_id) for value in state.values()}


def test_each_adapter_tensor_is_saved_once(workers):
    """Also with data-parallel replicas. The base model's checkpoint contains no adapters."""
    ranks = workers.run(sharded_names, 4, Layout(tensor=2))
    keys = [
        f"lora.layers.{n}.{p}.{s}" for n in range(4) for p in SETTINGS.projections for s in "AB"
    ]
    for key in keys:
        writers = sum(rank[key] for rank in ranks)
        is_split = key.endswith("A") == key.split(".")[3].startswith(("o_", "down_"))
        assert writers == (2 if is_split else 1), key
    assert all(rank.keys() == set(keys) for rank in ranks)


def all_gradients(layout: Layout) -> list[dict[str, Tensor]]:
    """Gradients with stored activations, with recomputation, and without dropout."""
    from megatron_idpo.mcore.parallel.groups import stop_layout

    found = []
    for recompute, dropout in (("off", 0.3), ("full", 0.3), ("off", 0.0)):
        found.append(gradients(layout, recompute, dropout))
        stop_layout()
    return found


def gradients(layout: Layout, recompute: str, dropout: float) -> dict[str, Tensor]:
    """Adapter gradients of one forward and backward pass."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model.build import Recompute

    settings = LoraConfig(rank=4, dropout=dropout)
    (chunk,), adapters = build(layout, settings, recompute=Recompute(granularity=recompute))
    for tensor in adapters.tensors():
        if tensor.side == "B":
            generator = torch.Generator().manual_seed(sum(tensor.name.encode()))
            tensor.parameter.data.copy_(torch.randn(tensor.parameter.shape, generator=generator))
    tokens = torch.arange(16)[None] * 7 % 256
    logits = chunk(tokens, torch.arange(16)[None], None, packed_seq_params=RowParams.plain(16))
    logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in adapters.parameters()}


@pytest.mark.parametrize("layout", [Layout(tensor=2), TP2_SP])
def test_recomputation_draws_the_same_dropout_masks(layout, workers):
    for stored, recomputed, no_dropout in workers.run(all_gradients, 2, layout):
        for name, gradient in stored.items():
            assert torch.equal(gradient, recomputed[name])
            assert not torch.equal(gradient, no_dropout[name])


def parallel_attributes(layout: Layout) -> dict[str, tuple[bool, bool]]:
    _, adapters = build(layout)
    return {
        name: (
            bool(getattr(parameter, "tensor_model_parallel", False)),
            bool(getattr(parameter, "sequence_parallel", False)),
        )
        for name, parameter in adapters.parameters()
        if ".0." in name
    }


@pytest.mark.parametrize("layout", [Layout(tensor=2), TP2_SP])
def test_parameters_have_megatrons_parallel_attributes(layout, workers):
    """The gradient norm counts replicas once, and partial gradients are summed."""
    for attributes in workers.run(parallel_attributes, 2, layout):
        for name, (is_split, is_summed) in attributes.items():
            is_row_parallel = "o_proj" in name or "down_proj" in name
            assert is_split == (name.endswith("A") == is_row_parallel), name
            assert is_summed == (layout.sequence_parallel and not is_split), name


def save_and_load_base_model(directory: str) -> bool:
    """Whether a model with adapters restores its base weights from its checkpoint."""
    from megatron_idpo.checkpoint.weights import load_weights, save_weights
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, adapters = build(Layout(tensor=2))
    before = {name: parameter.clone() for name, parameter in global_parameters(chunks)}
    save_weights(chunks, Path(directory))
    for _, parameter in global_parameters(chunks):
        parameter.data.fill_(torch.nan)
    load_weights(chunks, Path(directory), Architecture.from_hf(tiny_hf_config("qwen2")))
    assert len(list(adapters.parameters())) == 4 * 7 * 2
    return all(torch.equal(before[name], after) for name, after in global_parameters(chunks))


def test_the_base_models_checkpoint_contains_no_adapters(workers, tmp_path):
    from megatron_idpo.checkpoint.stored_weights import stored_weights

    assert workers.run(save_and_load_base_model, 2, str(tmp_path)) == [True, True]
    assert not any("lora" in key for key in stored_weights(tmp_path))
