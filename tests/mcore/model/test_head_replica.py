"""Head replicas in a distributed checkpoint: one copy is saved, all copies are loaded.

A checkpoint of chunks with replicas has the keys and sizes of one without, in any layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.testing import tiny_hf_config

pytestmark = pytest.mark.distributed

NUM_LAYERS, VOCAB = 4, 51
SIZES = {
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TAPS = [1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Case:
    layout: Layout
    tied: bool
    frozen: bool

    def __str__(self) -> str:
        layout = self.layout
        parts = [f"TP{layout.tensor}-PP{layout.pipeline}-VP{layout.virtual_pipeline}"]
        parts += ["tied" if self.tied else "untied", "frozen" if self.frozen else "trained"]
        return "-".join(parts)


def build(case: Case) -> tuple[list[Any], Any]:
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    config = tiny_hf_config("llama", tie_word_embeddings=case.tied, **SIZES)
    architecture = Architecture.from_hf(config)
    start_layout(case.layout)
    chunks = build_model(architecture, case.layout)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(("embedding.", "output_layer.", "decoder.final_layernorm.")):
                parameter.requires_grad_(not case.frozen)
    return chunks, architecture


def attached(chunks: list[Any]) -> Any:
    from megatron_idpo.plugin.attach import attach

    return attach(chunks, layers=TAPS, objective=Objective(), vocab_size=VOCAB)


def fill(chunks: list[Any], tied: bool) -> None:
    """Weights that differ in every parameter and on every tensor-parallel rank."""
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.mcore.parallel.groups import rank_coordinates

    for name, parameter in global_parameters(chunks):
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        shard = rank_coordinates().tp_rank if parameter.dim() > 1 else 0
        generator = torch.Generator().manual_seed(sum(name.encode()) * 8 + shard)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def save(directory: str, case: Case, with_replicas: bool) -> dict[str, Any]:
    """Save; return the head's copies and the shards that this rank writes."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_idpo.checkpoint.weights import save_weights, sharded_weights

    chunks, _ = build(case)
    fill(chunks, case.tied)
    if with_replicas:
        attached(chunks)
    written = [
        (tensor.key, tuple(tensor.global_offset))
        for tensor in sharded_weights(chunks).values()
        if hasattr(tensor, "global_offset") and is_main_replica(tensor.replica_id)
    ]
    save_weights(chunks, Path(directory))
    return {"copies": head_copies(chunks, case.tied), "written": written}


def head_copies(chunks: list[Any], tied: bool) -> dict[str, list[torch.Tensor]]:
    """All copies of the head's parameters on this rank."""
    copies: dict[str, list[torch.Tensor]] = {"weight": [], "norm": []}
    for chunk in chunks:
        replica = getattr(chunk, "head_replica", None)
        if replica is not None:
            copies["norm"].append(replica.norm.weight)
            copies["weight"] += [replica.weight] if replica.weight is not None else []
        if chunk.post_process:
            copies["norm"].append(chunk.decoder.final_layernorm.weight)
        if chunk.post_process and chunk.output_layer.weight is not None:
            copies["weight"].append(chunk.output_layer.weight)
        if chunk.pre_process and tied:
            copies["weight"].append(chunk.embedding.word_embeddings.weight)
    return {
        name: [tensor.detach().clone() for tensor in tensors] for name, tensors in copies.items()
    }


def load(directory: str, case: Case, with_replicas: bool) -> dict[str, list[torch.Tensor]]:
    """Fill with NaN, then load; return the head's copies on this rank."""
    from megatron_idpo.checkpoint.weights import load_weights

    chunks, architecture = build(case)
    fill(chunks, case.tied)
    if with_replicas:
        attached(chunks)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    load_weights(chunks, Path(directory), architecture)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert not parameter.isnan().any(), f"{name} was not loaded"
    return head_copies(chunks, case.tied)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Keys and sizes from the checkpoint's metadata."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {
        key: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else ()
        for key, entry in entries.items()
    }


def size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.distcp"))


def exhaustive(case: Case) -> Any:
    return pytest.param(case, marks=pytest.mark.exhaustive, id=str(case))


PP2, PP4 = Layout(pipeline=2), Layout(pipeline=4)
VP2 = Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2 = Layout(tensor=2, pipeline=2)
SELECTED = [Case(layout=PP2, tied=False, frozen=False), Case(layout=VP2, tied=True, frozen=True)]
ALL = [
    Case(layout=layout, tied=tied, frozen=frozen)
    for layout in (PP2, VP2, PP4, TP2_PP2)
    for tied in (False, True)
    for frozen in (False, True)
]


@pytest.mark.parametrize(
    "case", [*SELECTED, *(exhaustive(case) for case in ALL if case not in SELECTED)], ids=str
)
def test_one_copy_is_saved_and_all_copies_are_loaded(workers, tmp_path, case):
    ranks = case.layout.model_ranks
    with_replicas, without = tmp_path / "with", tmp_path / "without"
    for directory in (with_replicas, without):
        directory.mkdir()
    saved = workers.run(save, ranks, str(with_replicas), case, True)
    plain = workers.run(save, ranks, str(without), case, False)
    # One copy, with the owner's key: the same keys, sizes, writers and bytes as without replicas.
    assert stored_shapes(with_replicas) == stored_shapes(without)
    assert [rank["written"] for rank in saved] == [rank["written"] for rank in plain]
    assert size_on_disk(with_replicas) == size_on_disk(without)
    head = "embedding.word_embeddings.weight" if case.tied else "output_layer.weight"
    rows = -(-VOCAB // case.layout.tensor) * case.layout.tensor
    assert stored_shapes(with_replicas)[head] == (rows, SIZES["hidden_size"])
    assert not any("replica" in key for key in stored_shapes(with_replicas))
    # Loading fills every copy from either checkpoint.
    for directory in (with_replicas, without):
        loaded = workers.run(load, ranks, str(directory), case, True)
        for rank_loaded, rank_saved in zip(loaded, saved, strict=True):
            for name, tensors in rank_saved["copies"].items():
                for tensor, expected in zip(rank_loaded[name], tensors, strict=True):
                    assert torch.equal(tensor, expected)
    # Another layout without replicas can load it too.
    whole_case = Case(layout=Layout(), tied=case.tied, frozen=case.frozen)
    (whole,) = workers.run(load, 1, str(with_replicas), whole_case, False)
    shards = {}
    for rank, rank_saved in enumerate(saved):
        for tensor in rank_saved["copies"]["weight"]:
            shards[rank % case.layout.tensor] = tensor
    expected = torch.cat([shards[tensor] for tensor in range(case.layout.tensor)])
    assert torch.equal(whole["weight"][0], expected[:VOCAB])
    assert torch.equal(whole["norm"][0], saved[0]["copies"]["norm"][0])


def replica_attributes() -> dict[str, Any]:
    """Parameters and attributes of a replica, on one of two tensor-parallel ranks."""
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    from megatron_idpo.mcore.model.head_replica import HeadReplica, mark_shared_head
    from megatron_idpo.mcore.parallel.groups import ModelGroups

    (chunk,), _ = build(Case(layout=Layout(tensor=2), tied=False, frozen=False))
    with_weight, without = (
        HeadReplica(chunk, ModelGroups.of(), with_weight=with_weight)
        for with_weight in (True, False)
    )
    output = torch.nn.Parameter(torch.zeros(1))
    restore = mark_shared_head(output, is_owner=True)
    marked = dict(vars(output))
    restore()
    for name, parameter in with_weight.named_parameters():
        assert not param_is_not_shared(parameter), name
        assert parameter.shared_embedding
    with_weight.set_trainable(weight=False, norm=True)
    trainable = [parameter.requires_grad for parameter in with_weight.parameters()]
    hook_calls = []
    with_weight.norm.register_forward_pre_hook(lambda *_: hook_calls.append("norm"))
    with_weight.register_forward_pre_hook(lambda *_: hook_calls.append("replica"))
    with_weight()
    return {
        "names": [name for name, _ in with_weight.named_parameters()],
        "names_without": [name for name, _ in without.named_parameters()],
        "shape": tuple(with_weight.weight.shape),
        "is_a_shard": param_is_not_tensor_parallel_duplicate(with_weight.weight),
        "is_output": with_weight.weight.is_embedding_or_output_parameter,
        "marked": marked,
        "unmarked": dict(vars(output)),
        "trainable": trainable,
        "hook_calls": hook_calls,
    }


def test_a_replica_has_its_owners_attributes(workers):
    for attributes in workers.run(replica_attributes, 2):
        assert attributes == {
            "names": ["weight", "norm.weight"],
            "names_without": ["norm.weight"],
            "shape": (26, SIZES["hidden_size"]),
            "is_a_shard": True,
            "is_output": True,
            "marked": {"shared_embedding": True},
            "unmarked": {},
            "trainable": [False, True],
            "hook_calls": ["replica", "norm"],
        }
