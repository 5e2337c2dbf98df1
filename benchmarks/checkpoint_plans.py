"""Plans of saving and loading a training state on hundreds of ranks: sizes, balance and time.

    python benchmarks/checkpoint_plans.py [--ranks 512] [--record]

One process takes the place of one rank after the other, over torch's fake process group and with
tensors without memory (`FakeTensorMode`). The code that plans is the code that trains; nothing is
written but the metadata. Of the ranks that differ only in their tensor-parallel index, one is
built, and the others' chunks are its chunks under other names of tensors: as many, as large.
"""

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parent))
from result_file import commit, processor, save_result

ARCHIVE_BYTES = 1200
"""What `torch.save` adds to each piece, about."""


LOADED = 2
"""Of the data-parallel ranks of a stage, those whose load plans are made."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    name: str
    config: dict[str, Any]
    tensor: int
    pipeline: int
    lora_rank: int | None = None


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
LLAMA_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
CASES = (
    Case("70B, all weights, TP 8 PP 4", LLAMA_70B, 8, 4),
    Case("70B, LoRA 16, TP 8 PP 4", LLAMA_70B, 8, 4, lora_rank=16),
    Case("8B, all weights, TP 4", LLAMA_8B, 4, 1),
    Case("8B, LoRA 16, TP 1", LLAMA_8B, 1, 1, lora_rank=16),
)


@contextmanager
def one_of(rank: int, size: int, layout: Any) -> Iterator[None]:
    """This process as a rank of a large world, in a running layout."""
    from megatron_idpo.mcore.parallel import groups

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    # Otherwise megatron-core would create gloo groups as well, for its own checkpoints.
    with mock.patch.object(groups, "backend", lambda: "fake"):
        groups.start_layout(layout)
        try:
            yield
        finally:
            groups.stop_layout()
            dist.destroy_process_group()


def stage_chunks(case: Case, stage: int, size: int) -> list[tuple[list[Any], list[Any]]]:
    """For each data-parallel rank of a stage: the chunks to save, and those to load.

    Of tensor-parallel index 0.
    """
    from megatron.core import parallel_state

    from megatron_idpo.checkpoint import training_state
    from megatron_idpo.checkpoint.tensor_chunks import regions_by_parameter
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.config.lora import LoraConfig
    from megatron_idpo.config.training import OptimizerConfig
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.optim import optimizer as optim
    from megatron_idpo.mcore.optim.state import ShardedParam
    from megatron_idpo.mcore.parallel.replicas import Replicas

    layout = Layout(tensor=case.tensor, pipeline=case.pipeline, sequence_parallel=case.tensor > 1)
    architecture = Architecture.from_hf(case.config, "benchmark")
    data = size // (case.tensor * case.pipeline)
    rank = stage * case.tensor * data
    with FakeTensorMode(allow_non_fake_inputs=True), one_of(rank, size, layout):
        assert parallel_state.get_pipeline_model_parallel_rank() == stage
        chunks = build_model(architecture, layout, ModelOptions(dtype=torch.bfloat16))
        if case.lora_rank is not None:
            add_adapters(chunks, architecture, LoraConfig(rank=case.lora_rank), 0)
        with mock.patch.object(optim, "get_megatron_optimizer", lambda *_, **__: _NoOptimizer()):
            model = optim.setup_ddp_and_optimizer(chunks, OptimizerConfig(lr=1e-6), lambda: None)
        regions = regions_by_parameter(chunks)
        parts = [_optimizer_parts(model.model, index, data) for index in range(data)]
    # Operators on meta tensors are fast, on fake ones slow.
    twins = {
        parameter: torch.nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"),
            requires_grad=parameter.requires_grad,
        )
        for parameter in regions
    }
    by_twin = {
        twins[parameter]: parameter_regions for parameter, parameter_regions in regions.items()
    }
    no_group: Any = None
    results = []
    for index in range(data):
        inner: Any = SimpleNamespace(state={})
        shards = []
        for parameter, start, stop in parts[index]:
            main = torch.empty(stop - start, device="meta")
            inner.state[main] = {"exp_avg": main, "exp_avg_sq": main}
            shards.append(ShardedParam(twins[parameter], start, stop, main, inner, is_cut=True))
        replicas = Replicas(no_group, index, data)
        with (
            mock.patch.object(training_state, "sharded_params", lambda _, s=shards: s),
            mock.patch.object(training_state, "regions_by_parameter", lambda _: by_twin),
            mock.patch.object(Replicas, "running", lambda is_expert, one=replicas: one),
        ):
            saved = training_state._chunks_to_save((), None)
            loaded: list[Any] = []
            if index % max(data // LOADED, 1) == 0:
                loaded += training_state._chunks_to_load((), None, with_moments=True)
            results.append(([chunk for chunk in saved if chunk.saved_here], loaded))
    return results


def _optimizer_parts(
    model: Sequence[Any], index: int, size: int
) -> list[tuple[torch.nn.Parameter, int, int]]:
    """The ranges of parameters that the distributed optimizer of a data-parallel rank updates."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = []
    group = SimpleNamespace(rank=lambda: index, size=lambda: size)
    for buffer in (buffer for chunk in model for buffer in chunk.buffers):
        with mock.patch.object(buffer, "data_parallel_group", group):
            (ranges,) = DistributedOptimizer._build_gbuf_range_map(buffer).values()
        for bucket in ranges:
            for parameter, one in bucket["param_map"].items():
                parts.append((parameter, one["param"].start, one["param"].end))
    return parts


class _NoOptimizer:
    param_groups: tuple[Any, ...] = ()


@dataclass
class Measured:
    """One case."""

    num_pieces: int
    written_bytes: list[int]
    plan_bytes: int
    local_plan_s: float
    gather_s: float
    global_plan_s: float
    metadata_bytes: int
    checksums_bytes: int
    metadata_read_s: float
    load_plan_s: float
    opened_alone: int
    opened: int
    read_alone_bytes: int
    read_bytes: int


def measure(case: Case, size: int) -> Measured:
    """All ranks' save plans, one after another; load plans of a sample."""
    from megatron_idpo.checkpoint.dcp_planner import _LoadPlanner, _SavePlanner

    plans: list[SavePlan] = []
    loads: list[list[Any]] = []
    local_s: list[float] = []
    for stage in range(case.pipeline):
        for saved, loaded in stage_chunks(case, stage, size):
            loads.append(loaded)
            for tensor in range(case.tensor):
                named = [replace(chunk, key=f"{chunk.key}@{tensor}") for chunk in saved]
                start_s = time.perf_counter()
                plans.append(_SavePlanner(named).create_local_plan())
                local_s.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    sent = [pickle.dumps(plan) for plan in plans]
    received = [pickle.loads(plan) for plan in sent]
    gather_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    plans, metadata = _SavePlanner([]).create_global_plan(received)
    global_s = time.perf_counter() - start_s
    written = [_place(plan, rank, metadata) for rank, plan in enumerate(plans)]
    metadata_bytes, metadata_read_s = _read_back(metadata)
    load_s: list[float] = []
    alone: list[tuple[int, int]] = []
    together: list[tuple[int, int]] = []
    for loaded in filter(None, loads):
        named = [(replace(c, key=f"{c.key}@0"), replicas) for c, replicas in loaded]
        for results, wanted in ((alone, [(c, None) for c, _ in named]), (together, named)):
            planner = _LoadPlanner(wanted, Path("benchmark"))
            planner.set_up_planner({}, metadata)
            start_s = time.perf_counter()
            plan = planner.create_local_plan()
            load_s.append(time.perf_counter() - start_s)
            infos = [metadata.storage_data[item.storage_index] for item in plan.items]
            files = {info.relative_path for info in infos}
            results.append((len(files), sum(info.length for info in infos)))
    return Measured(
        num_pieces=len(metadata.storage_data),
        written_bytes=written,
        plan_bytes=sum(map(len, sent)),
        local_plan_s=max(local_s),
        gather_s=gather_s,
        global_plan_s=global_s,
        metadata_bytes=metadata_bytes,
        checksums_bytes=_checksums_bytes(metadata),
        metadata_read_s=metadata_read_s,
        load_plan_s=max(load_s),
        opened_alone=max(files for files, _ in alone),
        opened=max(files for files, _ in together),
        read_alone_bytes=max(num_bytes for _, num_bytes in alone),
        read_bytes=max(num_bytes for _, num_bytes in together),
    )


def _read_back(metadata: Metadata) -> tuple[int, float]:
    """Size of `.metadata`, and the time to read it."""
    from megatron_idpo.checkpoint.dcp_metadata import read_dcp_metadata

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, ".metadata")
        path.write_bytes(pickle.dumps(metadata))
        start_s = time.perf_counter()
        read_dcp_metadata(Path(directory))
        return path.stat().st_size, time.perf_counter() - start_s


def _checksums_bytes(metadata: Metadata) -> int:
    pieces: dict[str, dict[str, str]] = {}
    for info in metadata.storage_data.values():
        pieces.setdefault(info.relative_path, {})[str(info.offset)] = "0" * 32
    return len(json.dumps(pieces))


def _place(plan: SavePlan, rank: int, metadata: Metadata) -> int:
    """Enters where a rank's file would have each piece; returns the file's size."""
    metadata.storage_data = metadata.storage_data or {}
    position = 0
    for item in plan.items:
        assert item.tensor_data is not None and item.tensor_data.chunk is not None
        length = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        info = _StorageInfo(f"__{rank}_0.distcp", position, length + ARCHIVE_BYTES)
        metadata.storage_data[item.index] = info
        position += length + ARCHIVE_BYTES
    return position


def row(case: Case, measured: Measured) -> str:
    """The case in the table of `main`."""
    written = [count / 1e9 for count in measured.written_bytes]
    mean = sum(written) / len(written)
    cells = (
        case.name,
        f"{measured.num_pieces:,}",
        f"{mean:.3f} ({max(written) / mean:.2f})",
        f"{measured.metadata_bytes / 1e6:.1f} + {measured.checksums_bytes / 1e6:.1f}",
        f"{measured.local_plan_s:.2f}",
        f"{measured.plan_bytes / 1e6:.1f} MB, {measured.gather_s:.1f}",
        f"{measured.global_plan_s:.1f}",
        f"{measured.metadata_read_s:.1f}",
        f"{measured.load_plan_s:.2f}",
        f"{measured.opened_alone} → {measured.opened}",
        f"{measured.read_alone_bytes / 1e9:.3f} → {measured.read_bytes / 1e9:.3f}",
    )
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| case | pieces | GB written per rank (max/mean) | MB of .metadata + checksums.json "
    "| local plan, s | plans to rank 0, and s | global plan, s | reading .metadata, s "
    "| load plan, s | files that a rank opens, alone → shared "
    "| GB that a rank reads, alone → shared |"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it with `--record`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args(arguments)
    from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

    redirect_cuda_to_cpu()
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for index in options.cases:
        lines.append(row(CASES[index], measure(CASES[index], options.ranks)))
        print(lines[-1], flush=True)
    if options.record:
        title = f"# Checkpoint plans on {options.ranks} ranks\n\n{processor()}, commit {commit()}; "
        title += "`python benchmarks/checkpoint_plans.py --record`. Simulated, nothing written.\n\n"
        save_result("checkpoint-plans", title + "\n".join(lines))


if __name__ == "__main__":
    main()
