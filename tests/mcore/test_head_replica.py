"""Copies of the head in a distributed checkpoint: one is written, every one is read.

A checkpoint of chunks with copies has the keys and sizes of one without, in any layout.
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
        words = [f"TP{layout.tensor}-PP{layout.pipeline}-VP{layout.virtual_pipeline}"]
        words += ["tied" if self.tied else "untied", "frozen" if self.frozen else "trained"]
        return "-".join(words)


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


def save(directory: str, case: Case, with_copies: bool) -> dict[str, Any]:
    """Saves; tells how much of it is this rank's to write."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_idpo.checkpoint.weights import save_weights, sharded_weights

    chunks, _ = build(case)
    fill(chunks, case.tied)
    if with_copies:
        attached(chunks)
    written = [
        (one.key, tuple(one.global_offset))
        for one in sharded_weights(chunks).values()
        if hasattr(one, "global_offset") and is_main_replica(one.replica_id)
    ]
    save_weights(chunks, Path(directory))
    return {"copies": copies(chunks, case.tied), "written": written}


def copies(chunks: list[Any], tied: bool) -> dict[str, list[torch.Tensor]]:
    """Every holder of the head's parameters on this rank."""
    held: dict[str, list[torch.Tensor]] = {"weight": [], "norm": []}
    for chunk in chunks:
        replica = getattr(chunk, "head_replica", None)
        if replica is not None:
            held["norm"].append(replica.norm_weight)
            held["weight"] += [replica.weight] if replica.weight is not None else []
        if chunk.post_process:
            held["norm"].append(chunk.decoder.final_layernorm.weight)
        if chunk.post_process and chunk.output_layer.weight is not None:
            held["weight"].append(chunk.output_layer.weight)
        if chunk.pre_process and tied:
            held["weight"].append(chunk.embedding.word_embeddings.weight)
    return {name: [one.detach().clone() for one in ones] for name, ones in held.items()}


def load(directory: str, case: Case, with_copies: bool) -> dict[str, list[torch.Tensor]]:
    """Loads over NaN; this rank's holders of the head."""
    from megatron_idpo.checkpoint.weights import load_weights

    chunks, architecture = build(case)
    fill(chunks, case.tied)
    if with_copies:
        attached(chunks)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    load_weights(chunks, Path(directory), architecture)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert not parameter.isnan().any(), f"{name} was not filled"
    return copies(chunks, case.tied)


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    """Keys and sizes by the checkpoint's own metadata."""
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
CHOSEN = [
    Case(layout=PP2, tied=False, frozen=False),
    Case(layout=PP2, tied=True, frozen=True),
    Case(layout=VP2, tied=False, frozen=True),
    Case(layout=VP2, tied=True, frozen=False),
]
REST = [
    Case(layout=layout, tied=tied, frozen=frozen)
    for layout in (PP2, VP2, PP4, TP2_PP2)
    for tied in (False, True)
    for frozen in (False, True)
]


@pytest.mark.parametrize(
    "case", [*CHOSEN, *(exhaustive(case) for case in REST if case not in CHOSEN)], ids=str
)
def test_one_copy_is_written_and_every_copy_is_read(workers, tmp_path, case):
    ranks = case.layout.model_ranks
    with_copies, without = tmp_path / "with", tmp_path / "without"
    for directory in (with_copies, without):
        directory.mkdir()
    saved = workers.run(save, ranks, str(with_copies), case, True)
    plain = workers.run(save, ranks, str(without), case, False)
    # One copy, under the owner's key: the same keys, sizes, writers and bytes as without a plugin.
    assert stored(with_copies) == stored(without)
    assert [answer["written"] for answer in saved] == [answer["written"] for answer in plain]
    assert size_on_disk(with_copies) == size_on_disk(without)
    head = "embedding.word_embeddings.weight" if case.tied else "output_layer.weight"
    rows = -(-VOCAB // case.layout.tensor) * case.layout.tensor
    assert stored(with_copies)[head] == (rows, SIZES["hidden_size"])
    assert not any("replica" in key for key in stored(with_copies))
    # Loading fills every copy, whoever saved.
    for directory in (with_copies, without):
        loaded = workers.run(load, ranks, str(directory), case, True)
        for answer, truth in zip(loaded, saved, strict=True):
            for name, tensors in truth["copies"].items():
                assert len(tensors) == len(answer[name])
                for one, other in zip(answer[name], tensors, strict=True):
                    assert torch.equal(one, other)
    # Without the plugin, and in another layout.
    (whole,) = workers.run(load, 1, str(with_copies), plain_case(case), False)
    shards = {}
    for rank, answer in enumerate(saved):
        for tensor in answer["copies"]["weight"]:
            shards[rank % case.layout.tensor] = tensor
    expected = torch.cat([shards[tensor] for tensor in range(case.layout.tensor)])
    assert torch.equal(whole["weight"][0], expected[:VOCAB])
    assert torch.equal(whole["norm"][0], saved[0]["copies"]["norm"][0])


def plain_case(case: Case) -> Case:
    return Case(layout=Layout(), tied=case.tied, frozen=case.frozen)


def describe() -> dict[str, Any]:
    """What a copy is made of, on one of two tensor-parallel ranks."""
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    from megatron_idpo.mcore.model.head_replica import HeadReplica, mark_shared_head

    (chunk,), _ = build(Case(layout=Layout(tensor=2), tied=False, frozen=False))
    with_weight, without = (HeadReplica(chunk, with_weight=one) for one in (True, False))
    output = torch.nn.Parameter(torch.zeros(1))
    undo = mark_shared_head(output, is_owner=True)
    marked = dict(vars(output))
    undo()
    for name, parameter in with_weight.named_parameters():
        assert not param_is_not_shared(parameter), name
        assert parameter.shared_embedding
    with_weight.set_trainable(weight=False, norm=True)
    learns = [parameter.requires_grad for parameter in with_weight.parameters()]
    entered = []
    with_weight.norm.register_forward_pre_hook(lambda *_: entered.append("norm"))
    with_weight.register_forward_pre_hook(lambda *_: entered.append("replica"))
    with_weight()
    return {
        "names": [name for name, _ in with_weight.named_parameters()],
        "names_without": [name for name, _ in without.named_parameters()],
        "shape": tuple(with_weight.weight.shape),
        "is_a_shard": param_is_not_tensor_parallel_duplicate(with_weight.weight),
        "is_output": with_weight.weight.is_embedding_or_output_parameter,
        "marked": marked,
        "unmarked": dict(vars(output)),
        "learns": learns,
        "entered": entered,
    }


def test_what_a_copy_is_made_of(workers):
    for message in workers.run(describe, 2):
        assert message == {
            "names": ["weight", "norm.weight"],
            "names_without": ["norm.weight"],
            "shape": (26, SIZES["hidden_size"]),
            "is_a_shard": True,
            "is_output": True,
            "marked": {"shared_embedding": True},
            "unmarked": {},
            "learns": [False, True],
            "entered": ["replica", "norm"],
        }
