"""Cost of a cached reference: step time and peak memory, against no reference and SFT.

    python benchmarks/reference_cost.py --model DIR --data FILE [--save]

DPO with LoRA (rank 16 on all linears) on a small real model, 8 pairs per step.

* **Time**: one process, one policy. Every batch is trained on once with each reference, in an order
  that changes from batch to batch, so that other load on the machine affects all alike. The report
  has the median and the range of the steps' ratios to `none`, in wall time and in CPU time.
* **Memory**: one process for each kind; its peak resident memory including libraries, loading and,
  for `cache`, computing the cache. `sft` is supervised fine-tuning of the same adapter on the same
  rows with megatron-core's own model and loss, which computes logits of every position; the labels
  are the answers' tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_trl import LIBRARIES
from result_file import commit, processor, report_result
from torch import Tensor
from trl_case import Clock
from trl_data import choose_records

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.mcore.parallel.groups import seed_rng_for_step
from megatron_idpo.mcore.parallel.pipeline import run_schedule
from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
from megatron_idpo.plugin.rows import row_micro_batch
from megatron_idpo.reference.sources import NoReference
from megatron_idpo.train.run_directory import open_run_directory
from megatron_idpo.train.setup import assemble, prepare
from megatron_idpo.train.step import TrainStep
from megatron_idpo.train.trainer import Trainer

BATCH_PAIRS = 8
KINDS = ("none", "cache", "sft")
TIMED = ("none", "cache", "adapter_off")


@dataclass(frozen=True)
class Step:
    """Duration of one step."""

    wall_s: float
    cpu_s: float


@contextmanager
def assembled(options: argparse.Namespace, source: str, directory: Path) -> Iterator[Trainer]:
    """A `Trainer` before its first step, with its cache computed."""
    config = {
        "model": {"path": options.model, "dtype": options.dtype},
        "data": {
            "train": str(directory / "records.jsonl"),
            "row_tokens": options.row_tokens,
            "trim_tokens": 32,
            "max_length": options.max_length,
            "cache": str(directory / "tokens"),
            "num_workers": 1,
        },
        "objective": {"beta": 0.1, "layers": options.layers},
        "reference": {"source": source},
        "lora": {"rank": 16, "alpha": 16.0},
        "optimizer": {"lr": 5e-4, "schedule": "constant"},
        "training": {
            "output": str(directory / source),
            "global_batch_pairs": BATCH_PAIRS,
            "start_check": False,
        },
    }
    file = directory / f"{source}.yaml"
    file.write_text(write_yaml(config))
    loaded = load_config(file, required=REQUIRED, optional=OPTIONAL)
    with distributed_world() as world, open_run_directory(Path(loaded.training.output)) as output:
        prepared = prepare(loaded, world)
        with running_layout(loaded.layout, loaded.training.seed):
            yield assemble(loaded, world, output, prepared)


# ---- time ---------------------------------------------------------------------------------------


def timed_steps(options: argparse.Namespace, directory: Path) -> dict[str, list[Step]]:
    """Train on every batch with every reference; the first batch is warm-up and not counted."""
    with assembled(options, "cache", directory) as run:
        from megatron_idpo.train.references import build_reference

        policy = run.policy
        live = run.config.reference.model_copy(update={"source": "adapter_off"})
        with_live = run.config.model_copy(update={"reference": live})
        references: dict[str, Any] = {
            "none": NoReference(),
            "cache": run.train_step.reference,
            "adapter_off": build_reference(with_live, policy, run.reference, show_progress=False),
        }
        train_steps = {
            name: TrainStep(
                policy, references[name], run.train_step.objective, 0, run.train_step.location
            )
            for name in TIMED
        }
        steps: dict[str, list[Step]] = {name: [] for name in TIMED}
        for number, batch in enumerate(run.batches):
            turn = number % len(TIMED)
            for name in (*TIMED[turn:], *TIMED[:turn]):
                begun = time.perf_counter(), time.process_time()
                train_steps[name].train(batch, number + 1, lr=1e-6)
                ended = time.perf_counter(), time.process_time()
                steps[name].append(Step(ended[0] - begun[0], ended[1] - begun[1]))
                print(f"batch {number} {name}: {steps[name][-1].wall_s:.1f} s", file=sys.stderr)
        return {name: found[1:] for name, found in steps.items()}


def ratios(steps: dict[str, list[Step]], name: str, clock: Callable[[Step], float]) -> list[float]:
    """Step time of each batch relative to the same batch without a reference."""
    pairs = zip(steps[name], steps["none"], strict=True)
    return [clock(one) / clock(plain) for one, plain in pairs]


# ---- memory -------------------------------------------------------------------------------------


def peak_bytes(kind: str, options: argparse.Namespace, directory: Path) -> int:
    """Train on all records in this process; return its peak resident memory."""
    clock = Clock()
    source = "none" if kind == "sft" else kind
    with assembled(options, source, directory) as run:
        step = partial(_sft_step, run) if kind == "sft" else partial(_dpo_step, run)
        if kind == "sft":
            run.policy.dpo.detach()
        clock.start()
        for number, batch in enumerate(run.batches, start=1):
            step(batch, number)
            clock.step_done()
    return clock.measured(losses=[], margins=[], tokens=[], positions=0).peak_bytes


def _dpo_step(run: Trainer, batch: Batch, number: int) -> None:
    run.train_step.train(batch, number, lr=1e-6)


def _sft_step(run: Trainer, batch: Batch, number: int) -> None:
    """megatron-core's own forward pass and loss, averaged over the answers' tokens."""
    trainable = run.policy.trainable
    seed_rng_for_step(0, number)
    trainable.zero_grad_buffers()
    targets = sum(len(row.target_tokens_N) for row in batch.rows)
    micro_batches = [_labelled(batch, index) for index in range(len(batch.rows))]

    def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Tensor, Any]:
        inputs, mask_1T = next(iterator)
        losses_1T = chunk(**inputs)

        def loss(output_1T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return (output_1T * mask_1T).sum() * (len(batch.rows) / targets), {}

        return losses_1T, loss

    model = trainable.model
    model[0].module.config.finalize_model_grads_func = None
    for chunk in model:
        chunk.train()
    run_schedule(forward_step, micro_batches, model, row_tokens=batch.row_tokens, training=True)
    trainable.step(1e-6)


def _labelled(batch: Batch, index: int) -> tuple[dict[str, Any], Tensor]:
    """Input with labels at the positions that predict an answer's token, and their mask."""
    preferences, inputs = row_micro_batch(batch.rows[index], torch.device("cpu"))
    targets, tokens_1T = preferences.targets, inputs["input_ids"]
    labels_1T, mask_1T = torch.zeros_like(tokens_1T), torch.zeros(tokens_1T.shape)
    labels_1T[0, targets.positions_N] = targets.tokens_N
    mask_1T[0, targets.positions_N] = 1.0
    return {**inputs, "labels": labels_1T}, mask_1T


# ---- reporting ----------------------------------------------------------------------------------


def in_a_process(what: str, directory: Path) -> Any:
    """Run one part of this script in a separate process; return its result."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", what, "--directory"]
    done = subprocess.run([*command, str(directory)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(steps: dict[str, list[Step]], peaks: dict[str, int], options: Any) -> str:
    """The page that `--save` writes."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        "# Cost of a cached reference",
        "",
        f"{date.today()}, {processor()}, {options.threads} threads; {versions}; commit {commit()}. "
        f"{options.pairs} pairs of at most {options.max_length} tokens in rows of at most "
        f"{options.row_tokens}, {options.dtype}, layers {options.layers}; SmolLM2-135M, LoRA rank "
        "16. `benchmarks/reference_cost.py` describes what is measured.",
        "",
        "| reference | step, s | step / none: median | lowest | highest | of CPU time: median |",
        "|---|---|---|---|---|---|",
    ]
    for name in TIMED:
        wall = ratios(steps, name, lambda step: step.wall_s)
        cpu = ratios(steps, name, lambda step: step.cpu_s)
        seconds = statistics.median(step.wall_s for step in steps[name])
        lines.append(
            f"| {name} | {seconds:.2f} | **{statistics.median(wall):.3f}** | {min(wall):.3f} "
            f"| {max(wall):.3f} | {statistics.median(cpu):.3f} |"
        )
    lines += ["", "| kind | peak GB | / sft |", "|---|---|---|"]
    lines += [
        f"| {kind} | {peaks[kind] / 1e9:.2f} | {peaks[kind] / peaks['sft']:.2f} |" for kind in KINDS
    ]
    return "\n".join([*lines, ""])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory of SmolLM2-135M")
    parser.add_argument("--data", type=Path, required=True, help="a jsonl file of pairs")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--row-tokens", type=int, default=864)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--layers", type=json.loads, default=[15], metavar="[15]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print; save on request."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.part == "time":
        found = timed_steps(options, options.directory)
        print(json.dumps({n: [[s.wall_s, s.cpu_s] for s in each] for n, each in found.items()}))
        return
    if options.part:
        print(json.dumps(peak_bytes(options.part, options, options.directory)))
        return
    with tempfile.TemporaryDirectory() as name:
        records = Path(name) / "records.jsonl"
        choose_records(options.data, records, options.model, options.max_length, options.pairs)
        peaks = {}
        for kind in KINDS:
            own = Path(name) / kind
            own.mkdir()
            (own / records.name).write_bytes(records.read_bytes())
            peaks[kind] = in_a_process(kind, own)
            print(f"{kind}: {peaks[kind] / 1e9:.2f} GB", file=sys.stderr)
        message = in_a_process("time", Path(name))
    steps = {name: [Step(*each) for each in found] for name, found in message.items()}
    text = report(steps, peaks, options)
    report_result("reference-cost", text, save=options.save)


if __name__ == "__main__":
    main()
