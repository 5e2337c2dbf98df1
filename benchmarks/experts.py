"""Experts one after another against experts computed together: CPU seconds and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/experts.py [--experts 128] [--topk 8] [--repeats 5]

A step is forward and backward of one row on one rank, without the optimizer. Every repeat runs both
in turn; the seconds are of CPU time, so that other work on the machine matters little, and the
medians of the repeats. Peak memory is of a process that runs one of them, above what it has before
the first step. "trained": all weights; "frozen": only the embedding, as adapters would train.
"""

import argparse
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.mcore.attention.row_params import RowParams
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import ModelOptions, build_model
from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
from megatron_idpo.testing import tiny_hf_config

KINDS = {"sequential": False, "grouped": True}


def step_of(arguments: argparse.Namespace, *, grouped: bool, frozen: bool) -> Callable[[], None]:
    """A model with random weights, and a function that runs its forward and backward."""
    config = tiny_hf_config(
        "qwen3_moe",
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.ffn,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.topk,
    )
    architecture, tokens = Architecture.from_hf(config), arguments.tokens
    (chunk,) = build_model(architecture, Layout(), ModelOptions(grouped_experts=grouped))
    torch.manual_seed(0)
    for name, parameter in chunk.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05)
        parameter.requires_grad_(not frozen or name.startswith("embedding."))
    ids = torch.randint(0, architecture.vocab_size, (1, tokens))
    row = RowParams.plain(tokens)

    def step() -> None:
        chunk.zero_grad(set_to_none=True)
        output = chunk(ids, torch.arange(tokens)[None], None, packed_seq_params=row)
        output.float().square().mean().backward()

    return step


def cpu_seconds(arguments: argparse.Namespace, *, frozen: bool) -> dict[str, float]:
    """Median CPU seconds of a step by kind, in turn."""
    steps = {
        kind: step_of(arguments, grouped=grouped, frozen=frozen) for kind, grouped in KINDS.items()
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for repeat in range(arguments.repeats + 1):
        for kind, step in steps.items():
            start_s = time.process_time()
            step()
            if repeat:  # the first one warms up
                seconds[kind].append(time.process_time() - start_s)
    return {kind: median(values) for kind, values in seconds.items()}


def peak_bytes(arguments: argparse.Namespace, *, grouped: bool, frozen: bool) -> int:
    """Highest resident memory in two steps, above that before them."""
    step = step_of(arguments, grouped=grouped, frozen=frozen)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    for _ in range(2):
        step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _in_world(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.set_num_threads(1)
    with distributed_world(), running_layout(Layout()):
        return function(*args, **kwargs)


def _in_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_in_world, (function, *args), kwargs)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"experts": 128, "topk": 8, "hidden": 64, "ffn": 32, "layers": 2, "tokens": 512}
    for name, value in (*defaults.items(), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(", ".join(f"{name} {getattr(arguments, name)}" for name in defaults))
    print("| weights | experts | CPU s per step | peak MB |\n| --- | --- | ---: | ---: |")
    for frozen in (False, True):
        seconds = _in_process(cpu_seconds, arguments, frozen=frozen)
        for kind, grouped in KINDS.items():
            peak = _in_process(peak_bytes, arguments, grouped=grouped, frozen=frozen)
            weights = "frozen" if frozen else "trained"
            print(f"| {weights} | {kind} | {seconds[kind]:.3f} | {peak / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
