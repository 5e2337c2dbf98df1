"""One step of large layouts on a phantom GPU without arithmetic: memory, launches, waits, CPU time.

    python benchmarks/phantom_steps.py [ROW ...] [--before CHECKOUT] [--compiled] [--save]

No GPU takes part. torch's CUDA path runs with its real allocator and dispatcher on a stand-in whose
kernels do nothing (`docs/cuda.md`), as one rank of torch's fake process group; FlexAttention is
replaced by a function that keeps the same tensors. Nothing is compiled, which needs more memory and
launches than a run; with `--compiled` everything but FlexAttention is. Measured in the third step
of a process:

* the allocator's peak, launches of kernels and of matrix products, and waits of the host: counted;
* CPU seconds of the process: what the host needs to issue the step, on this machine's processor. A
  real driver adds about 4 µs per launch, which is added in another column as an estimate.

If the sum exceeds what the GPU needs for the same step, the step is bound by launches. GPU time is
not measured here: it is estimated as FLOPs at 60 % of an H100's dense bf16 peak.

With `--before`, each row is also measured in another checkout, in turn, by that checkout's script;
the smaller CPU time of `REPEATS` processes counts. The commit before the work on the CUDA path has
no phantom GPU. There it is added:

    git worktree add --detach before dad67b0
    cd before
    git checkout 685d6f5 -- megatron_idpo/testing/phantom_gpu benchmarks/phantom_steps.py
    sed -i /chosen_tokens=384/d benchmarks/phantom_steps.py  # a field that its batches lack

`megatron_idpo.testing.random_step` says what is replaced.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from megatron_idpo.testing.phantom_gpu import environment, run_python

LAUNCH_S = 4e-6
"""What a driver takes per launch. An estimate from the literature, not measured."""

GPU_FLOPS = 0.6 * 989e12
"""60 % of an H100's dense bf16 peak."""

REPEATS = 2
"""Processes of a row and checkout in a comparison, for their CPU time; counts are equal in all."""

ROW_TOKENS = 4096
LONG_ROW_TOKENS = 136 << 10
"""A prompt with an answer of 128k tokens and another answer of 8k, as in `examples/*_128k.yaml`."""

LONG_ANSWER_TOKENS = 1024
"""Of each answer of a pair that fills a longer row."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Layout:
    """One line of the table."""

    model: str
    rows: int
    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    rank: int = 0
    lora: bool = True
    dropout: float = 0.05
    recompute: str = "off"
    offload: bool = False
    """Layer inputs in the host's memory (`training.offload_activations`)."""
    row_tokens: int = ROW_TOKENS
    """A longer row than `ROW_TOKENS` is one pair."""

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tensor * self.pipeline * self.context)


def _long(
    model: str,
    row_tokens: int = LONG_ROW_TOKENS,
    *,
    tensor: int = 1,
    context: int = 1,
    lora: bool = True,
    offload: bool = False,
) -> Layout:
    """A step on one long pair, with layers recomputed."""
    return Layout(
        model,
        1,
        world=tensor * context,
        tensor=tensor,
        context=context,
        lora=lora,
        recompute="full",
        offload=offload,
        row_tokens=row_tokens,
    )


LAYOUTS = {
    "8b-lora": Layout("8b", 4),
    "8b-lora-no-dropout": Layout("8b", 4, dropout=0.0),
    "8b-lora-recompute": Layout("8b", 4, recompute="full"),
    "8b-full-dp64": Layout("8b", 2, world=64, lora=False),
    "70b-lora-tp8": Layout("70b", 4, world=64, tensor=8),
    "70b-full-tp8-pp4": Layout("70b", 8, world=64, tensor=8, pipeline=4, rank=32, lora=False),
    "70b-lora-tp8-pp8": Layout("70b", 16, world=512, tensor=8, pipeline=8, rank=64),
    **{f"8b-lora-32k-cp{n}": _long("8b", 32 << 10, context=n) for n in (1, 2, 4, 8)},
    "8b-lora-128k-cp8": _long("8b", context=8),
    "8b-lora-32k-cp1-offload": _long("8b", 32 << 10, offload=True),
    "8b-lora-128k-cp8-offload": _long("8b", context=8, offload=True),
    "8b-lora-128k-tp8": _long("8b", tensor=8),
    "8b-lora-128k-tp2-cp4": _long("8b", tensor=2, context=4),
    "8b-full-128k-tp8-cp8": _long("8b", tensor=8, context=8, lora=False),
    "70b-lora-128k-tp8-cp8": _long("70b", tensor=8, context=8),
}


_HEADER = """\
| layout | peak GB | launches | waits | CPU s | CPU s + 4 µs per launch | GPU s (estimate) |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Measure each layout in a separate process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layouts", nargs="*", metavar="ROW", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", metavar="CHECKOUT", help="compare with the code in it")
    parser.add_argument("--compiled", action="store_true", help="compile what a run compiles")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    names = arguments.layouts or list(LAYOUTS)
    if arguments.in_process:
        print(json.dumps(measure(LAYOUTS[names[0]])))
        return
    print(_HEADER)
    lines = [_HEADER]
    for name in names:
        for line in _lines(name, arguments.before, is_compiled=arguments.compiled):
            print(line, flush=True)
            lines.append(line)
    if arguments.save:
        option = " --compiled" if arguments.compiled else ""
        _save("\n".join(lines), option, arguments.before)


def _lines(name: str, before: str | None, *, is_compiled: bool) -> Iterator[str]:
    """The lines of one row."""
    if before is None:
        yield _line(name, measured(name, is_compiled=is_compiled))
        return
    checkouts = {f"{name}, before": Path(before).resolve(), name: None}
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in checkouts}
    for _ in range(REPEATS):  # in turn: both meet the same load of the machine
        for label, checkout in checkouts.items():
            runs[label].append(measured(name, is_compiled=is_compiled, checkout=checkout))
    for label, measurements in runs.items():
        yield _line(label, min(measurements, key=lambda values: values["cpu_s"]))


def measured(
    name: str, *, is_compiled: bool = False, checkout: Path | None = None
) -> dict[str, float]:
    """`measure` of one of `LAYOUTS`, in a process of its kind; of another checkout's script."""
    variables = environment(arithmetic="none") | {"PHANTOM_GPU_COPY_BYTES": str(1 << 20)}
    if is_compiled:
        variables |= {"TORCHDYNAMO_DISABLE": "0"}
    script = Path(__file__)
    if checkout is not None:
        script = checkout / "benchmarks" / script.name
        variables["PYTHONPATH"] = f"{checkout}{os.pathsep}{variables['PYTHONPATH']}"
    ran = run_python(["-W", "ignore", str(script), name, "--in-process"], variables)
    if ran.code:
        raise SystemExit(ran.stderr)
    values: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return values


def _line(name: str, measured: dict[str, float]) -> str:
    launches = measured["launches"] + measured["gemms"]
    issued_s = measured["cpu_s"] + launches * LAUNCH_S
    peak_gb, gpu_s = measured["peak_bytes"] / 1e9, measured["flops"] / GPU_FLOPS
    return (
        f"| {name} | {peak_gb:.1f} | {launches:,.0f} | {measured['syncs']:.0f} "
        f"| {measured['cpu_s']:.2f} | {issued_s:.2f} | {gpu_s:.2f} |"
    )


def _save(table: str, option: str, before: str | None) -> None:
    # Here, because a test imports this script as a module, without its directory.
    from result_file import commit, save_result

    save_result(
        f"phantom-steps{option.replace(' --', '-')}",
        f"# One step of large layouts on a stand-in for a GPU\n\n"
        f"`python benchmarks/phantom_steps.py{option} --save`, {date.today()}, commit "
        f"{commit()}{'' if before is None else f', before: {commit(Path(before))}'}. "
        f"No GPU: kernels do nothing (`docs/cuda.md`). CPU seconds on "
        f"{platform.machine()}, shared with other work.\n\n{table}\n",
        "stand-in",
    )


@contextmanager
def uncompiled_attention() -> Iterator[None]:
    """The stand-in for FlexAttention is not compiled, within the block."""
    from megatron_idpo.mcore.attention import flex

    with patch.object(flex, "_compiled_flex_attention", lambda *_: vars(flex)["flex_attention"]):
        yield


def measure(layout: Layout) -> dict[str, float]:
    """The last step of this layout, in a process on a phantom GPU.

    `held_bytes` is what exists between steps: weights, gradients, the optimizer's state.
    """
    import torch

    from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

    with suppress_megatron_warnings():
        from megatron_idpo.mcore.model.architecture import Architecture
        from megatron_idpo.mcore.parallel.world import running_layout
        from megatron_idpo.testing.phantom_gpu.counters import Counts
        from megatron_idpo.testing.phantom_gpu.device import phantom
        from megatron_idpo.testing.random_step import random_step

        config = _config(layout)
        with ExitStack() as stack:
            stack.enter_context(phantom(world=(layout.rank, layout.world)))
            stack.enter_context(running_layout(config.layout))
            stack.enter_context(uncompiled_attention())
            architecture = Architecture.from_hf(MODELS[layout.model])
            step = stack.enter_context(random_step(config, architecture, is_alone=True))
            batch = _batch(layout)
            for index in (1, 2):  # the first compiles
                step.train(batch, index, lr=1e-4)
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            before, start_s = Counts.now(), time.process_time()
            step.train(batch, 3, lr=1e-4)
            cpu_s, used = time.process_time() - start_s, Counts.now().since(before)
            peak = torch.cuda.max_memory_allocated()
    measured = {"cpu_s": cpu_s, "peak_bytes": peak, "held_bytes": held, "flops": _flops(layout)}
    return {**asdict(used), **measured}


def _config(layout: Layout) -> Any:
    from megatron_idpo.config.run_config import RunConfig

    sections: dict[str, Any] = {
        "model": {"path": "x", "dtype": "bf16"},
        "data": {"train": "x.jsonl", "row_tokens": layout.row_tokens, "max_length": 2048},
        "objective": {"beta": 0.1, "layers": [0.69], "intermediate_weight": 0.1},
        "layout": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            "sequence_parallel": layout.tensor > 1,
        },
        "optimizer": {"lr": 1e-4},
        "training": {
            "output": "x",
            "global_batch_pairs": 32,
            "recompute": layout.recompute,
            "offload_activations": layout.offload,
        },
    }
    if layout.lora:
        sections["lora"] = {"rank": 16, "alpha": 16, "dropout": layout.dropout}
    return RunConfig.model_validate(sections)


def _batch(layout: Layout) -> Any:
    """Full rows of pairs with 1024 tokens, or of one long pair."""
    from megatron_idpo.data.packing.batches import Batch
    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.data.pairs import Pair

    is_long = layout.row_tokens > ROW_TOKENS
    pairs_per_row, answer_tokens = (1, LONG_ANSWER_TOKENS) if is_long else (4, 384)
    prompt_tokens = layout.row_tokens // pairs_per_row - 2 * answer_tokens

    def pair(index: int) -> Pair:
        prompt, answer = (np.ones(n, dtype=np.int32) for n in (prompt_tokens, answer_tokens))
        return Pair(index=index, prompt_tokens=prompt, chosen_tokens=answer, rejected_tokens=answer)

    rows = tuple(
        Row.build(
            [pair(row * pairs_per_row + i) for i in range(pairs_per_row)], layout.row_tokens, 0
        )
        for row in range(layout.rows)
    )
    num_pairs = pairs_per_row * layout.rows * layout.replicas
    num_tokens = layout.rows * layout.row_tokens * layout.replicas
    return Batch(
        rows=rows,
        num_pairs=num_pairs,
        chosen_tokens=answer_tokens * num_pairs,
        consumed_pairs=0,
        used_tokens=num_tokens,
        computed_tokens=num_tokens,
    )


def _flops(layout: Layout) -> float:
    """Products on one GPU: per weight and position 4 with LoRA and 6 without, and attention."""
    model = MODELS[layout.model]
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    kv = hidden * model["num_key_value_heads"] // heads
    per_layer = hidden * (2 * hidden + 2 * kv + 3 * model["intermediate_size"])
    weights = model["num_hidden_layers"] * per_layer / (layout.tensor * layout.pipeline)
    per_weight = (4 if layout.lora else 6) + (2 if layout.recompute == "full" else 0)
    positions = layout.rows * layout.row_tokens / layout.context
    products = per_weight * weights * positions
    if layout.row_tokens > ROW_TOKENS:
        # Two products forward and five backward for each visible pair of positions; two more each
        # time that a layer or, with context parallelism, attention is recomputed.
        repeated = (layout.recompute == "full") + (layout.context > 1)
        layers = model["num_hidden_layers"] / (layout.tensor * layout.pipeline)
        seen_keys = layout.row_tokens / 2
        products += 2 * (7 + 2 * repeated) * hidden * layers * seen_keys * positions
    return float(products)


if __name__ == "__main__":
    main()
