"""The adapters of a chunk in checkpoints and in recomputation; the model's own names stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

TP2_PP2 = Layout(tensor=2, pipeline=2)
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


def everything(adapters: Any) -> dict[str, Tensor]:
    """This stage's whole adapters on its first rank."""
    from megatron_idpo.mcore.parallel.groups import gather_tensor_shards

    found = {}
    for one in adapters.tensors():
        shards = gather_tensor_shards(one.parameter.detach())
        if shards is not None:
            split = one.split_dim
            found[one.name] = shards[0] if split is None else torch.cat(shards, split)
    return {name: tensor.clone() for name, tensor in found.items()}


def save(directory: str, layout: Layout) -> dict[str, Tensor]:
    """Adapters alone, by megatron-core."""
    from megatron.core import dist_checkpointing

    from megatron_idpo.mcore.parallel.groups import rank_coordinates

    chunks, adapters = build(layout)
    for one in adapters.tensors():
        rank = 0 if one.split_dim is None else rank_coordinates().tp_rank
        generator = torch.Generator().manual_seed(sum(one.name.encode()) * 2 + rank)
        one.parameter.data.copy_(torch.randn(one.parameter.shape, generator=generator))
    dist_checkpointing.save(_sharded(chunks), directory)
    return everything(adapters)


def _sharded(chunks: Any) -> dict[str, Any]:
    return {
        f"{number}.{key}": value
        for number, chunk in enumerate(chunks)
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
    return everything(adapters)


def merged(parts: Any) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


@pytest.mark.parametrize("other", [Layout(), PP2_VP2, TP2_SP])
def test_another_layout_reads_what_one_has_saved(other, workers, tmp_path):
    saved = merged(workers.run(save, 4, str(tmp_path), TP2_PP2))
    found = merged(workers.run(load, other.model_ranks, str(tmp_path), other))
    assert found.keys() == saved.keys() and len(saved) == 4 * 7 * 2
    assert all(torch.equal(saved[name], tensor) for name, tensor in found.items())


def sharded_names(layout: Layout) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_idpo.checkpoint.weights import sharded_weights
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, adapters = build(layout)
    named = {id(parameter): name for name, parameter in adapters.parameters()}
    state = _sharded(chunks)
    assert all(named[id(value.data)] == value.key for value in state.values())
    own = [name for name, _ in global_parameters(chunks)]
    with_adapters = sorted(sharded_weights(chunks))
    adapters.remove()
    assert own == [name for name, _ in global_parameters(chunks)]
    assert with_adapters == sorted(sharded_weights(chunks))
    return {value.key: is_main_replica(value.replica_id) for value in state.values()}


def test_each_tensor_is_the_parameter_and_is_written_once(workers):
    """On data-parallel replicas too; the model's own checkpoint knows nothing of adapters."""
    answers = workers.run(sharded_names, 4, Layout(tensor=2))
    keys = [f"lora.layers.{n}.{p}.{s}" for n in range(4) for p in SETTINGS.projections for s in "AB"]
    for key in keys:
        writers = sum(answer[key] for answer in answers)
        is_split = key.endswith("A") == key.split(".")[3].startswith(("o_", "down_"))
        assert writers == (2 if is_split else 1), key
    assert all(answer.keys() == set(keys) for answer in answers)


def gradients(layout: Layout, recompute: str, dropout: float) -> dict[str, Tensor]:
    """After one forward and backward pass of a chunk that draws dropout masks."""
    from megatron_idpo.mcore.attention.row_params import RowParams
    from megatron_idpo.mcore.model.build import Recompute

    settings = LoraConfig(rank=4, dropout=dropout)
    (chunk,), adapters = build(layout, settings, recompute=Recompute(granularity=recompute))
    for one in adapters.tensors():
        if one.side == "B":
            generator = torch.Generator().manual_seed(sum(one.name.encode()))
            one.parameter.data.copy_(torch.randn(one.parameter.shape, generator=generator))
    tokens = torch.arange(16)[None] * 7 % 256
    logits = chunk(tokens, torch.arange(16)[None], None, packed_seq_params=RowParams.plain(16))
    logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in adapters.parameters()}


@pytest.mark.parametrize("layout", [Layout(tensor=2), TP2_SP])
def test_recomputation_draws_the_same_masks(layout, workers):
    kept = workers.run(gradients, 2, layout, "off", 0.3)
    again = workers.run(gradients, 2, layout, "full", 0.3)
    without = workers.run(gradients, 2, layout, "off", 0.0)
    for one, other, plain in zip(kept, again, without, strict=True):
        assert all(torch.equal(gradient, other[name]) for name, gradient in one.items())
        assert not any(torch.equal(gradient, plain[name]) for name, gradient in one.items())


def marks(layout: Layout) -> dict[str, tuple[bool, bool]]:
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
def test_megatron_core_knows_what_is_split(layout, workers):
    """For norms of gradients, which count replicas once, and for their sums."""
    for found in workers.run(marks, 2, layout):
        for name, (is_split, is_summed) in found.items():
            is_row_parallel = "o_proj" in name or "down_proj" in name
            assert is_split == (name.endswith("A") == is_row_parallel), name
            assert is_summed == (layout.sequence_parallel and not is_split), name


def saved_with_adapters(directory: str) -> bool:
    """Whether a model reads from its checkpoint what it was when it had adapters."""
    from megatron_idpo.checkpoint.weights import load_weights, save_weights
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import global_parameters

    chunks, adapters = build(Layout(tensor=2))
    before = {name: parameter.clone() for name, parameter in global_parameters(chunks)}
    save_weights(chunks, Path(directory))
    for parameter in before:
        dict(global_parameters(chunks))[parameter].data.fill_(torch.nan)
    load_weights(chunks, Path(directory), Architecture.from_hf(tiny_hf_config("qwen2")))
    assert len(list(adapters.parameters())) == 4 * 7 * 2
    return all(torch.equal(before[name], one) for name, one in global_parameters(chunks))


def test_the_base_models_checkpoint_has_no_adapters(workers, tmp_path):
    from megatron_idpo.checkpoint.stored_weights import stored_weights

    assert workers.run(saved_with_adapters, 2, str(tmp_path)) == [True, True]
    assert not any("lora" in key for key in stored_weights(tmp_path))
