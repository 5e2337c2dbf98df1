"""How long a background save keeps training waiting, compared to a copy and to a whole save.

    python benchmarks/background_save.py [--output DIR] [--record]

One process on a CPU. `save` copies the state and starts a thread, then the next step may begin;
`copy` is what cannot be avoided: cloning the same tensors. Written with a flush to the disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from result_file import commit, processor, save_result

ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """A model whose state is as large as it fits here, with as many tensors as the real one."""

    name: str
    layers: int
    hidden: int
    lora_rank: int | None = None


CASES = (
    Case("all weights, 32 layers as in 8B", 32, 384),
    Case("LoRA 128 on 7 projections of 32 layers, as in 8B", 32, 256, lora_rank=128),
)


def trained(case: Case) -> tuple[list[Any], Any]:
    """Model chunks and an optimizer that has taken a step, with any values."""
    import torch

    from megatron_idpo.config.layout import Layout
    from megatron_idpo.config.lora import LoraConfig
    from megatron_idpo.config.training import OptimizerConfig
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.optim.optimizer import setup_ddp_and_optimizer
    from megatron_idpo.mcore.optim.state import set_optimizer_step, sharded_params
    from megatron_idpo.testing.tiny_models import tiny_hf_config

    sizes = {"hidden_size": case.hidden, "intermediate_size": 4 * case.hidden, "vocab_size": 8192}
    config = tiny_hf_config("llama") | sizes
    config |= {"num_hidden_layers": case.layers, "head_dim": case.hidden // 8}
    architecture = Architecture.from_hf(config, "benchmark")
    chunks = build_model(architecture, Layout(), ModelOptions(dtype=torch.bfloat16))
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    if case.lora_rank is not None:
        add_adapters(chunks, architecture, LoraConfig(rank=case.lora_rank), 0)
    model = setup_ddp_and_optimizer(chunks, OptimizerConfig(lr=1e-4), lambda *_, **__: None)
    for shard in sharded_params(model.optimizer):
        shard.moments()
    set_optimizer_step(model.optimizer, 1)
    return chunks, model.optimizer


def measure(case: Case, directory: Path) -> str:
    """A row of the table."""
    from megatron_idpo.checkpoint.metadata import Progress
    from megatron_idpo.checkpoint.store import Checkpoints
    from megatron_idpo.checkpoint.training_state import copy_state

    chunks, optimizer = trained(case)
    copies = copy_state(chunks, optimizer)
    num_bytes = sum(chunk.tensor.nbytes for chunk in copies)
    copy_s, blocked_s, whole_s = [], [], []
    with Checkpoints(directory / case.name.split(",")[0].replace(" ", "-"), keep_last=1) as saved:
        for step in range(ROUNDS + 1):
            start_s = time.perf_counter()
            clones = [chunk.tensor.clone() for chunk in copies]
            copy_s.append(time.perf_counter() - start_s)
            del clones
            progress = Progress(
                step=step + 1, data={}, data_fingerprint="", base_model="", config={}
            )
            start_s = time.perf_counter()
            saved.save(chunks, optimizer, progress)
            blocked_s.append(time.perf_counter() - start_s)
            saved.wait()
            whole_s.append(time.perf_counter() - start_s)
    # The first round allocates memory and imports.
    middle = [statistics.median(times[1:]) for times in (copy_s, blocked_s, whole_s)]
    cells = (case.name, f"{len(copies):,}", f"{num_bytes / 1e6:.0f}", *(f"{s:.3f}" for s in middle))
    return f"| {' | '.join(cells)} |"


HEADER = "| case | tensors | MB | copy, s | training waits, s | whole save, s |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it with `--record`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write (default: temporary)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args(arguments)
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout

    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    with tempfile.TemporaryDirectory(dir=options.output) as directory, distributed_world():
        for case in CASES:
            with running_layout(Layout()):
                lines.append(measure(case, Path(directory)))
    print("\n".join(lines))
    if options.record:
        title = f"# Background saves\n\n{processor()}, commit {commit()}; medians of {ROUNDS}; "
        title += "`python benchmarks/background_save.py --record`.\n\n"
        save_result("background-save", title + "\n".join(lines))


if __name__ == "__main__":
    main()
