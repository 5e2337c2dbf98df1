"""One training step on a GPU with random weights: planned against measured peak, tokens/s, MFU.

    python benchmarks/gpu_step.py CASE [--steps 5]

Prints a line of JSON. The model has the sizes of a real one; weights are random, so that nothing is
downloaded. Rows are full of pairs of 1024 positions. With LoRA every step computes the reference,
as in `gpu_trl.py`; without, the reference is a cache. The first step compiles; then `--steps` steps
are timed, and the median counts. On a phantom GPU without arithmetic, in the rehearsal of
`make gpu` (`tools/gpu.py`), memory is that of a GPU and times mean nothing.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.plan.devices import DEVICES, device_of
from megatron_idpo.plan.models import ModelSizes
from megatron_idpo.plan.plan import Plan
from megatron_idpo.plan.row_time import row_time
from megatron_idpo.plan.run_sizes import Assumptions, RunSizes

_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def _sizes(layers: int, hidden: int, heads: int, keys: int, ffn: int, **more: Any) -> Any:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    fields = dict(zip(names, (layers, hidden, heads, keys), strict=True))
    return {**_LLAMA, **fields, "intermediate_size": ffn, **more}


MODELS = {
    "tiny": _sizes(2, 64, 4, 2, 128, vocab_size=512),
    "1b": _sizes(16, 2048, 32, 8, 8192),
    "3b": _sizes(28, 3072, 24, 8, 8192),
    "8b": _sizes(32, 4096, 32, 8, 14336),
}
"""The shapes of Llama 3.1 and 3.2, with untied embeddings."""


PAIR_TOKENS = 1024
"""Positions of a pair in `random_step.full_batch`."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    model: str
    rows: int = 4
    layers: tuple[float, ...] = ()
    lora: bool = True
    recompute: str = "off"
    row_tokens: int = 4096
    dtype: str = "bf16"

    @property
    def pairs(self) -> int:
        """Of a step: as `random_step.full_batch` fills the rows."""
        return max(self.row_tokens // PAIR_TOKENS, 1) * self.rows


CASES = {
    "tiny": Case("tiny", 2, row_tokens=256, dtype="fp32"),
    "tiny-tap": Case("tiny", 2, (1,), row_tokens=256, dtype="fp32"),
    "8b-lora-tap": Case("8b", layers=(0.69,)),
    "8b-lora": Case("8b"),
    "1b-full-tap": Case("1b", layers=(0.69,), lora=False),
    "1b-lora-tap": Case("1b", layers=(0.69,)),
    "1b-lora": Case("1b"),
    "3b-lora-tap-recompute": Case("3b", layers=(0.69,), recompute="full"),
}


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with suppress_megatron_warnings():
        print(json.dumps(measure(CASES[arguments.case], arguments.steps)))


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Peak, seconds and what was planned."""
    import torch

    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
    from megatron_idpo.testing import random_step as random_weights

    assert random_weights.PAIR_TOKENS == PAIR_TOKENS
    config, hf_config = _config(case), MODELS[case.model]
    with ExitStack() as stack:
        stack.enter_context(distributed_world())
        stack.enter_context(running_layout(config.layout))
        computes = os.environ.get("PHANTOM_ARITHMETIC") != "none"
        architecture = Architecture.from_hf(hf_config)
        stepper = random_weights.random_step(config, architecture, is_alone=not computes)
        train_step = stack.enter_context(stepper)
        batch = random_weights.full_batch(case.row_tokens, case.rows, 1)
        seconds = []
        for step in range(1, steps + 2):
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            train_step.train(batch, step, lr=1e-6)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start_s)
        peak_bytes = torch.cuda.max_memory_allocated()
        reserved_bytes = torch.cuda.max_memory_reserved()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
    step_s = statistics.median(seconds[1:])
    plan = _plan(case, config, hf_config, torch.cuda.get_device_name())
    flops = plan.time.mfu * plan.time.step * plan.device.peak_flops
    return {
        "device": torch.cuda.get_device_name(),
        "peak_bytes": peak_bytes,
        "reserved_bytes": reserved_bytes,
        "used_bytes": total_bytes - free_bytes,  # with the context, and other processes
        "planned_bytes": round(plan.largest.allocated),
        "planned_total_bytes": round(plan.largest.total),
        "first_step_s": seconds[0],
        "step_s": step_s,
        "estimated_step_s": _estimated_step_s(case, plan),
        "pairs_per_s": case.pairs / step_s,
        "tokens_per_s": case.rows * case.row_tokens / step_s,
        "mfu": flops / step_s / plan.device.peak_flops,
    }


def _config(case: Case) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {"path": "x", "dtype": case.dtype},
        "data": {"train": "x", "row_tokens": case.row_tokens, "max_length": case.row_tokens},
        "objective": {"layers": list(case.layers)},
        "optimizer": {"lr": 1e-6},
        "training": {"output": "x", "global_batch_pairs": case.rows, "recompute": case.recompute},
    }
    if case.lora:
        sections["lora"] = {"rank": 16, "dropout": 0.05}
        sections["reference"] = {"source": "adapter_off"}
    return RunConfig.model_validate(sections)


def _plan(case: Case, config: RunConfig, hf_config: dict[str, Any], name: str) -> Plan:
    """Its step has as many pairs as are run, whose attention is that of pairs."""
    sizes = ModelSizes.from_hf(hf_config, case.model)
    assumed = Assumptions(pair_tokens=min(case.row_tokens, PAIR_TOKENS))
    run = replace(RunSizes.of(config, sizes, 1, assumed), global_batch_pairs=case.pairs)
    device = device_of(name) or DEVICES["h100"]
    # Memory is that of rows which are full.
    longest = RunSizes.of(config, sizes, 1, Assumptions(pair_tokens=case.row_tokens))
    return replace(Plan.of(run, device), memory=Plan.of(longest, device).memory)


def _estimated_step_s(case: Case, plan: Plan) -> float:
    """Of the rows that are run: `plan` expects pairs of different lengths, which fill rows less."""
    step_s = row_time(plan.run, 0, plan.device).total * case.rows + plan.time.update
    if plan.run.has_live_reference:
        step_s += row_time(plan.run, 0, plan.device, is_forward=True).total * case.rows
    return step_s


if __name__ == "__main__":
    main()
