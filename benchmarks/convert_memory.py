"""Peak memory and time of converting a model, relative to its size.

    python benchmarks/convert_memory.py [--directory SCRATCH] [--parameters 1.5]

Creates a random Llama (bf16, 4 shards; 1.5 billion parameters with the vocabulary of Llama 3, the
largest tensor is 0.5 GB), then measures, each in new processes:

* Hugging Face to Megatron-Core, one process;
* back, one process; every tensor must be identical;
* loading the Hugging Face model into TP2, two processes, without saving.

Peak is the largest anonymous memory of a process and its children, sampled every 20 ms. Mapped
files are not counted: they are page cache, which the kernel can reclaim. "All processes" is the
largest sum over the processes of a run. Fails if a process takes more than its weights and 1 GB.
The output is also written to `benchmarks/results/`.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from result_file import ROOT, processor, save_result

from megatron_idpo.convert.families import hf_shapes, weights_bytes
from megatron_idpo.convert.hf_io.reader import HfCheckpoint
from megatron_idpo.convert.hf_io.safetensors_file import TensorSpec
from megatron_idpo.convert.hf_io.writer import HfWriter
from megatron_idpo.mcore.model.architecture import Architecture

ALLOWED_BYTES = 10**9
"""In addition to the weights; torch and megatron-core alone take about 0.75 GB."""

SAMPLE_S = 0.02
NUM_SHARDS = 4
RANDOM_BYTES = 64 << 20

LOAD = """
import sys
from pathlib import Path
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
with suppress_megatron_warnings():
    from megatron_idpo.convert.hf_to_megatron import hf_dtype, load_hf_weights, open_hf
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.model.build import ModelOptions, build_model
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
layout = Layout(tensor=2)
with distributed_world(), running_layout(layout):
    checkpoint, architecture = open_hf(Path(sys.argv[1]))
    options = ModelOptions(dtype=hf_dtype(checkpoint, architecture))
    load_hf_weights(build_model(architecture, layout, options), checkpoint, architecture)
"""


@dataclass(frozen=True)
class Measured:
    """One run."""

    what: str
    held_bytes: int
    """Weights of each process: the model, or its shard."""

    peak_bytes: int
    """Of the process with the largest peak."""

    together_bytes: int
    """Of all processes at the same time."""

    seconds: float

    @property
    def extra_bytes(self) -> int:
        """Peak of a process in addition to its weights."""
        return self.peak_bytes - self.held_bytes


def llama_config(billions: float) -> dict[str, Any]:
    """A Llama with about this many parameters, wide layers and a large vocabulary."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    embeddings = 2 * 128256 * 2048
    layer = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    config["num_hidden_layers"] = max(round((billions * 1e9 - embeddings) / layer), 1)
    return config


def write_model(directory: Path, config: dict[str, Any]) -> int:
    """Write a random model, one tensor in memory at a time; return the bytes of its weights."""
    shapes = hf_shapes(Architecture.from_hf(config))
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    shard_bytes = weights_bytes(shapes, torch.bfloat16) // NUM_SHARDS + RANDOM_BYTES
    # Generated once and shifted for each tensor: only the bytes matter here.
    noise = torch.randn(RANDOM_BYTES // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    with HfWriter(directory, specs, token="make", max_shard_bytes=shard_bytes) as writer:
        writer.begin()
        for number, spec in enumerate(specs):
            size = spec.num_bytes // 2
            shifted = noise.roll(number * 1009)
            whole = shifted.repeat(-(-size // len(shifted)))[:size] if size else shifted[:0]
            writer.write(spec.name, whole.view(spec.shape))
        (writer.incomplete / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        writer.finish()
    return weights_bytes(shapes, torch.bfloat16)


def measure(what: str, commands: Sequence[Sequence[str]], held_bytes: int) -> Measured:
    """Run the commands concurrently; several commands are the ranks of one world."""
    begin_s = time.monotonic()
    environments = [dict(os.environ) for _ in commands]
    if len(commands) > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for rank, environment in enumerate(environments):
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(len(commands))}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment)
        for command, environment in zip(commands, environments, strict=True)
    ]
    peaks = dict.fromkeys((process.pid for process in running), 0)
    together = 0
    while running:
        now_bytes = {process.pid: _anonymous_bytes(process.pid) for process in running}
        together = max(together, sum(now_bytes.values()))
        peaks |= {pid: max(peaks[pid], num_bytes) for pid, num_bytes in now_bytes.items()}
        for process in list(running):
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                running.remove(process)
                if status:
                    raise SystemExit(f"{what}: a process ended with status {status}")
        time.sleep(SAMPLE_S)
    return Measured(what, held_bytes, max(peaks.values()), together, time.monotonic() - begin_s)


def _anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and all its children."""
    total = 0
    try:
        for process in _family(pid):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    except psutil.NoSuchProcess:
        pass
    return total


def _family(pid: int) -> Iterator[psutil.Process]:
    process = psutil.Process(pid)
    yield process
    yield from process.children(recursive=True)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors with the same bytes."""
    first, second = HfCheckpoint(one), HfCheckpoint(other)
    return first.names() == second.names() and all(
        torch.equal(first.read(name).view(torch.int16), second.read(name).view(torch.int16))
        for name in first.names()
    )


def run(directory: Path, billions: float) -> tuple[int, list[Measured]]:
    """Create the model and run all measurements; also return its size."""
    hf, megatron, back = (directory / name for name in ("hf", "megatron", "back"))
    model_bytes = write_model(hf, llama_config(billions))
    convert = [sys.executable, "-m", "megatron_idpo", "convert"]
    there = [*convert, "hf-to-megatron", str(hf), str(megatron)]
    again = [*convert, "megatron-to-hf", str(megatron), str(back)]
    load = [sys.executable, "-c", LOAD, str(hf)]
    measured = [
        measure("Hugging Face to Megatron-Core", [there], model_bytes),
        measure("Megatron-Core to Hugging Face", [again], model_bytes),
        measure("load into TP2, each of 2 ranks", [load, load], model_bytes // 2),
    ]
    assert same_tensors(hf, back), "the round trip changed a tensor"
    return model_bytes, measured


def report(model_bytes: int, measured: Sequence[Measured]) -> str:
    """The table."""
    lines = [
        "# Memory of conversions",
        "",
        f"{date.today()}, {os.cpu_count()} cores of {processor()}, torch {torch.__version__}. A "
        f"random Llama of {model_bytes / 2e9:.2f} billion parameters, bf16 "
        f"({model_bytes / 1e9:.2f} GB, {NUM_SHARDS} shards); the round trip is byte-identical.",
        "",
        "| run | weights, GB | peak, GB | peak beyond weights, GB | all processes, GB | s |",
        "|---|---|---|---|---|---|",
    ]
    for one in measured:
        figures = (one.held_bytes, one.peak_bytes, one.extra_bytes, one.together_bytes)
        cells = " | ".join(f"{figure / 1e9:.2f}" for figure in figures)
        lines.append(f"| {one.what} | {cells} | {one.seconds:.0f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure, print and save; return 1 if a process took too much memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, help="for about 6 bytes per parameter")
    parser.add_argument("--parameters", type=float, default=1.5, help="billions (default: 1.5)")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=options.directory))
    try:
        model_bytes, measured = run(directory, options.parameters)
    finally:
        shutil.rmtree(directory)
    text = report(model_bytes, measured)
    print(text)
    save_result("convert-memory", text)
    too_much = [one.what for one in measured if one.extra_bytes > ALLOWED_BYTES]
    for what in too_much:
        print(f"more than {ALLOWED_BYTES / 1e9:.0f} GB beyond the model: {what}", file=sys.stderr)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
