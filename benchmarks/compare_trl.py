"""DPO with LoRA on a small real model: TRL's DPOTrainer and this package, speed and peak memory.

    python benchmarks/compare_trl.py --model DIR --data DIR [--rounds 2] [--save]
    python benchmarks/compare_trl.py --model DIR --data PAIRS.jsonl --max-length 1024 [--seed 1]

A directory of `--data` contains `alpaca_eval_gpt4.jsonl` and `finegrained_qa_feedback_dev.jsonl`; a
file has pairs of your own. `--seed` draws the pairs, which are otherwise spread over the file.
The model is SmolLM2-135M (`tools/smollm2.py`). Both sides train the same adapter (rank 16 on all
linears, dropout 0) from the same initial values, on the same 32 pairs in the same order, 8 pairs
per optimizer step, in the same precision, with the reference computed in every step by disabling
the adapter. They alternate; each measurement is a separate process with `--threads` threads.

* **pairs/s**: from the end of the first step to the end of the last one, which excludes start-up
  and warm-up; the median of all rounds. **per CPU second**: the same in CPU time, which other load
  on the machine affects less.
* **peak**: peak resident memory of the process, including libraries, loading and weights; the
  highest of all rounds. **in training**: the same from the first step on.
* **tokens**: the benchmark fails if the two sides train on different tokens in any step. Losses are
  compared too; the report has their largest difference.

TRL runs with 4 pairs per device, 2 accumulation steps and otherwise its defaults, which include
gradient checkpointing (`--trl` selects variants: see `TRL_VARIANTS`). This package runs rows of at
most `--row-tokens` positions, cut to a multiple of `--trim-tokens`. With `--ours auto` it
recomputes what it must to stay within `--memory-gb`.
"""

import argparse
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from result_file import ROOT, commit, processor, report_result
from trl_case import Case, Measured
from trl_data import choose_records, write_adapter

DATA = {
    "alpaca": ("alpaca_eval_gpt4.jsonl", 512),
    "finegrained": ("finegrained_qa_feedback_dev.jsonl", 1024),
}
"""File and `max_length`."""

FILE_MAX_LENGTH = 1024
"""`max_length` of a file of your own."""

BATCH_PAIRS = 8
TRL_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no checkpointing": {"checkpointing": False},
    "fp32 weights": {"weights": "fp32"},
    "answers only": {"compact": True},
    "answers only, no checkpointing": {"compact": True, "checkpointing": False},
    "8 x 1": {"micro_pairs": 8},
    "2 x 4": {"micro_pairs": 2},
    "1 x 8": {"micro_pairs": 1},
}
"""TRL's settings in addition to those of the case; described in `trl_theirs.py`."""

OUR_VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "8 of 30 layers": {"recompute": "full", "recompute_layers": 8},
    "15 of 30 layers": {"recompute": "full", "recompute_layers": 15},
    "full": {"recompute": "full"},
    "auto": {"recompute": "auto"},
}
LIBRARIES = ("torch", "trl", "transformers", "peft", "accelerate", "megatron-core")
TIMEOUT_S = 3 * 3600


@dataclass
class Compared:
    """A case and the measurements of both sides."""

    title: str
    case: Case
    ours: list[Measured] = field(default_factory=list)
    theirs: list[Measured] = field(default_factory=list)

    def check(self) -> None:
        """Assert that both sides trained on the same tokens."""
        tokens = {tuple(each.tokens) for each in [*self.ours, *self.theirs]}
        assert len(tokens) == 1, f"{self.title}: the sides did not train on the same tokens"

    @property
    def speeds(self) -> tuple[float, float]:
        """Pairs per second, ours and theirs."""
        ours, theirs = (
            statistics.median(each.pairs_per_s(BATCH_PAIRS) for each in side)
            for side in (self.ours, self.theirs)
        )
        return ours, theirs

    @property
    def speed_ratio(self) -> float:
        """Our speed relative to TRL's."""
        ours, theirs = self.speeds
        return ours / theirs

    @property
    def cpu_ratio(self) -> float:
        """The same per CPU second."""
        ours, theirs = (
            statistics.median(each.pairs_per_cpu_s(BATCH_PAIRS) for each in side)
            for side in (self.ours, self.theirs)
        )
        return ours / theirs

    @property
    def memory_ratio(self) -> float:
        """Our peak memory relative to TRL's."""
        return _highest(self.ours, "peak_bytes") / _highest(self.theirs, "peak_bytes")

    @property
    def loss_difference(self) -> float:
        """The largest difference of the losses in any step."""
        return max(
            abs(one - other)
            for one, other in zip(self.ours[0].losses, self.theirs[0].losses, strict=True)
        )

    def line(self) -> str:
        """The row of the table."""
        ours, theirs = self.speeds
        sides = (self.ours, self.theirs)
        peaks = " | ".join(
            f"{_highest(side, name) / 1e9:.2f}"
            for name in ("peak_bytes", "train_peak_bytes")
            for side in sides
        )
        positions = self.ours[0].positions / self.theirs[0].positions
        return (
            f"| {self.title} | {ours:.3f} | {theirs:.3f} | **{self.speed_ratio:.2f}** "
            f"| {self.cpu_ratio:.2f} | {peaks} "
            f"| **{self.memory_ratio:.2f}** | {positions:.2f} | {self.loss_difference:.1e} |"
        )


HEADS = (
    "case",
    "ours, pairs/s",
    "TRL, pairs/s",
    "ours / TRL",
    "per CPU second",
    "ours, peak GB",
    "TRL, peak GB",
    "ours, in training",
    "TRL, in training",
    "ours / TRL",
    "positions, ours / TRL",
    "losses differ by",
)


def _highest(measured: Sequence[Measured], name: str) -> int:
    return max(int(getattr(each, name)) for each in measured)


# ---- measuring ----------------------------------------------------------------------------------


def measure(case: Case, side: str, directory: Path, package: Path = ROOT) -> Measured:
    """Run one side in a separate process, with the package of a checkout."""
    file = directory / "case.json"
    case.write(file)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(case.threads),
        "PYTHONPATH": str(package),  # the checkout, not an installed package
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--case", str(file)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run_side(side: str, file: Path) -> None:
    """In the separate process: train, and print the result as the last line."""
    module = importlib.import_module({"ours": "trl_ours", "trl": "trl_theirs"}[side])
    print(json.dumps(asdict(module.train(Case.read(file)))))


def compare(title: str, case: Case, options: Any, directory: Path) -> Compared:
    """Run both sides alternately."""
    result = Compared(title, case)
    rows = {"row_tokens": options.row_tokens, "trim_tokens": options.trim_tokens}
    ours = {**rows, **OUR_VARIANTS[options.ours], "memory_gb": options.memory_gb}
    theirs = TRL_VARIANTS[options.trl]
    ordered = str(Path(case.records).with_suffix(".ordered.jsonl"))
    for _ in range(options.rounds):
        result.ours.append(measure(_with(case, side=ours), "ours", directory))
        result.theirs.append(measure(_with(case, side=theirs, records=ordered), "trl", directory))
        result.check()
        print(result.line(), flush=True)
    return result


def _with(case: Case, **changes: Any) -> Case:
    return Case(**{**asdict(case), **changes})


# ---- reporting ----------------------------------------------------------------------------------


def report(compared: Sequence[Compared], options: Any) -> str:
    """The page that `--save` writes."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    ratios = [each.speed_ratio for each in compared]
    memory = [each.memory_ratio for each in compared]
    lines = [
        "# This package and TRL",
        "",
        f"    {shlex.join(['python', 'benchmarks/compare_trl.py', *words])}",
        "",
        f"{date.today()}, {processor()}, {os.cpu_count()} cores, {options.threads} threads; "
        f"{versions}; commit {commit()}. The script describes what is measured.",
        "",
        f"TRL: {options.trl}; ours: rows of at most {options.row_tokens} positions, cut to a "
        f"multiple of {options.trim_tokens}, recompute {options.ours}"
        f"{_limit(options)}; {options.rounds} round(s) in turns.",
        "",
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
        *(each.line() for each in compared),
        "",
        f"Geometric mean of the speeds: **{statistics.geometric_mean(ratios):.2f}**, lowest "
        f"{min(ratios):.2f}. Highest share of TRL's peak memory: {max(memory):.2f}.",
        "",
        "Seconds of each step after the first:",
        "",
    ]
    for each in compared:
        for name, side in (("ours", each.ours), ("TRL", each.theirs)):
            rounds = "; ".join(_steps(measured) for measured in side)
            lines.append(f"* {each.title}, {name}: {rounds}")
    return "\n".join([*lines, ""])


def _limit(options: argparse.Namespace) -> str:
    return f" within {options.memory_gb} GB" if options.memory_gb else ""


def _steps(measured: Measured) -> str:
    ends_s = measured.step_ends_s
    return ", ".join(f"{end - begin:.1f}" for begin, end in pairwise(ends_s))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face directory of SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--sets", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--max-length", type=int, help=f"a file's is {FILE_MAX_LENGTH}")
    parser.add_argument("--seed", type=int, help="draw the pairs instead of spreading them")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--layers", type=json.loads, nargs="+", default=[[]], metavar="[20,25]")
    parser.add_argument("--pairs", type=int, default=32, help=f"a multiple of {BATCH_PAIRS}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--trim-tokens", type=int, default=32, help="0: all rows of one length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", choices=TRL_VARIANTS, default="default")
    parser.add_argument("--ours", choices=OUR_VARIANTS, default="off", help="recompute")
    parser.add_argument("--memory-gb", type=float, help="the limit of --ours auto")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _sets(options: argparse.Namespace) -> list[tuple[str, Path, int]]:
    """Name, file and `max_length` of each set."""
    if options.data.is_file():
        return [(options.data.stem, options.data, FILE_MAX_LENGTH)]
    return [(name, options.data / DATA[name][0], DATA[name][1]) for name in options.sets]


def main() -> None:
    """Measure and print; save on request."""
    options = arguments()
    if options.side:
        run_side(options.side, options.case)
        return
    compared = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        adapter = directory / "adapter"
        write_adapter(options.model, adapter, Case.rank)
        for set_name, file, set_length in _sets(options):
            max_length = options.max_length or set_length
            records = directory / f"{set_name}.jsonl"
            choose_records(file, records, options.model, max_length, options.pairs, options.seed)
            for dtype in options.dtypes:
                for layers in options.layers:
                    case = Case(
                        model=options.model,
                        records=str(records),
                        adapter=str(adapter),
                        max_length=max_length,
                        dtype=dtype,
                        layers=tuple(layers),
                        batch_pairs=BATCH_PAIRS,
                        threads=options.threads,
                    )
                    message = f", layers {layers}" if layers else ""
                    title = f"{set_name} at {max_length}, {dtype}{message}"
                    compared.append(compare(title, case, options, directory))
    text = report(compared, options)
    report_result("compare-trl", text, save=options.save)


if __name__ == "__main__":
    main()
