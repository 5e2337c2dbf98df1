"""Learning curve of LoRA in bf16 against fp32 and against PEFT, with time and memory.

    python benchmarks/bf16_learning.py --model DIR --data FILE [--before DIR] [--save]

DPO with LoRA (rank 16 on all linears) on SmolLM2-135M (`tools/smollm2.py`, in bf16, so that fp32
has the same weights), `--steps` steps over the same 8 short pairs, so that a curve is smooth. All
runs of a seed start from the same PEFT adapter; a seed has its own pairs. What is compared is the
reward margin before each update:

* **fp32** and **bf16**: this package.
* **bf16 before**: the package of another checkout (`--before`).
* **PEFT bf16**: TRL's trainer, with a model in bf16 and the adapters as PEFT makes them (fp32),
  without gradient checkpointing, scoring answers only.

Every run is a process with one thread. CPU time and peak memory are those of the steps after the
first (`trl_case.py`). `--results FILE` keeps finished runs, so that a stopped comparison resumes.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from compare_trl import LIBRARIES, measure
from result_file import ROOT, commit, processor, report_result
from trl_case import Case, Measured
from trl_data import choose_records, write_adapter

PAIRS = 8
SEEDS = 3
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 20)
"""Steps in the table."""

RUNS: Mapping[str, tuple[str, str]] = {
    "fp32": ("ours", "fp32"),
    "bf16": ("ours", "bf16"),
    "bf16 before": ("ours", "bf16"),
    "PEFT bf16": ("trl", "bf16"),
}
"""Side and dtype."""

TRL = {"micro_pairs": PAIRS, "checkpointing": False, "compact": True}
"""Its fastest settings here (`trl_theirs.py`)."""

type Results = dict[str, dict[int, Measured]]
"""Of each run, by seed."""


def compare(options: argparse.Namespace) -> Results:
    """Read finished runs, and run the others."""
    results: Results = {name: {} for name in RUNS if name != "bf16 before" or options.before}
    for seed in options.seeds:
        missing = []
        for name, by_seed in results.items():
            if (measured := _stored(options.results, name, seed)) is not None:
                by_seed[seed] = measured
            else:
                missing.append(name)
        if missing and not options.report_only:
            for name, measured in _run(options, seed, missing):
                _store(options.results, name, seed, measured)
                results[name][seed] = measured
    return results


def _run(
    options: argparse.Namespace, seed: int, names: Sequence[str]
) -> Iterator[tuple[str, Measured]]:
    """Train a seed, one run after the other."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        adapter, records = directory / "adapter", directory / "pairs.jsonl"
        write_adapter(options.model, adapter, Case.rank, seed)
        _write_records(options, seed, records)
        for run in names:
            side, dtype = RUNS[run]
            case = Case(
                model=options.model,
                records=str(records),
                adapter=str(adapter),
                max_length=options.max_length,
                dtype=dtype,
                batch_pairs=PAIRS,
                epochs=options.steps,
                lr=options.lr,
                threads=1,
                side=TRL if side == "trl" else {},
            )
            package = options.before if run == "bf16 before" else ROOT
            measured = measure(case, side, directory, package)
            print(f"{run}, seed {seed}: {_rounded(measured.margins)}", flush=True)
            yield run, measured


def _write_records(options: argparse.Namespace, seed: int, target: Path) -> None:
    """The seed's part of the records that are spread evenly over the file."""
    every = target.with_name("all.jsonl")
    choose_records(options.data, every, options.model, options.max_length, PAIRS * SEEDS)
    lines = every.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[seed::SEEDS]))


def _stored(file: Path | None, name: str, seed: int) -> Measured | None:
    if file is None or not file.exists():
        return None
    found = json.loads(file.read_text()).get(f"{name}, seed {seed}")
    return None if found is None else Measured(**found)


def _store(file: Path | None, name: str, seed: int, measured: Measured) -> None:
    if file is not None:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {f"{name}, seed {seed}": asdict(measured)}))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


# ---- reporting ----------------------------------------------------------------------------------


def report(results: Results, options: argparse.Namespace) -> str:
    """The page that `--save` writes."""
    steps = [step for step in SHOWN if step <= options.steps]
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    before = f", before {commit(options.before)}" if options.before else ""
    lines = [
        "# LoRA in bf16 against fp32 and PEFT",
        "",
        f"    {shlex.join(['python', 'benchmarks/bf16_learning.py', *words])}",
        "",
        f"{date.today()}, {processor()}, one thread per run; {versions}; commit {commit()}{before}."
        f" {PAIRS} pairs of up to {options.max_length} tokens in every step, learning rate "
        f"{options.lr:g}. The script describes what is measured.",
        "",
        "Reward margin before the update of a step (before step 1 all are 0), by seed:",
        "",
        f"| run | seed | {' | '.join(map(str, steps))} |",
        f"|---|---|{'---|' * len(steps)}",
    ]
    for name, by_seed in results.items():
        for seed, measured in by_seed.items():
            margins = " | ".join(f"{measured.margins[step - 1]:.4f}" for step in steps)
            lines.append(f"| {name} | {seed} | {margins} |")
    lines += [
        "",
        "| run | margin / fp32's, step 2 | step 3 | step 4 | largest difference of a loss "
        "| CPU s per step | peak GB in training |",
        "|---|---|---|---|---|---|---|",
        *(_line(name, runs, results["fp32"]) for name, runs in results.items() if runs),
        "",
        "The ratios and the CPU time are means over seeds, the others the largest of any seed.",
    ]
    return "\n".join(lines)


def _line(name: str, by_seed: Mapping[int, Measured], fp32: Mapping[int, Measured]) -> str:
    both = [(measured, fp32[seed]) for seed, measured in by_seed.items()]
    ratios = [
        statistics.mean(one.margins[step - 1] / other.margins[step - 1] for one, other in both)
        for step in (2, 3, 4)
    ]
    difference = max(
        abs(loss - other_loss)
        for one, other in both
        for loss, other_loss in zip(one.losses, other.losses, strict=True)
    )
    step_s = statistics.mean(PAIRS / measured.pairs_per_cpu_s(PAIRS) for measured, _ in both)
    peak = max(measured.train_peak_bytes for measured, _ in both) / 1e9
    shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"| {name} | {shown} | {difference:.4f} | {step_s:.2f} | {peak:.2f} |"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory of SmolLM2-135M")
    parser.add_argument("--data", type=Path, required=True, help="pairs as jsonl")
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--results", type=Path, help="json file of finished runs")
    parser.add_argument("--report-only", action="store_true", help="of what --results has")
    seeds = range(SEEDS)
    parser.add_argument("--seeds", type=int, nargs="+", choices=seeds, default=list(seeds))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    return parser.parse_args()


def main() -> None:
    """Measure and print; save on request."""
    options = arguments()
    text = report(compare(options), options)
    report_result("bf16-learning", text, save=options.save)


if __name__ == "__main__":
    main()
