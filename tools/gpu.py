"""Run what only a GPU can prove, the most valuable first, within a time limit: `make gpu`.

    python tools/gpu.py [--budget-s 540] [--phantom] [--only NAME ...]

Each step is a program with a time limit of its expected duration times three, after which its
process group is ended. Its result is a file in `runs/gpu/COMMIT`: a second call continues where
the first one stopped, and runs failed steps again, after those that have not been run. The
summary is written to `benchmarks/results/gpu_DATE_DEVICE_COMMIT.md` at the end.

`--phantom` rehearses it on a machine without a GPU (`docs/cuda.md`): all programs run to their end.
Tests, head and `tiny` compute, in small sizes; the steps of 1B to 8B have their real shapes, whose
memory counts, and compute nothing. Times mean nothing.
"""

import argparse
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUDGET_S = 540.0
LIMIT = 3
"""Times the expected duration: a step that hangs does not take the time of the later ones."""

ARITHMETIC = "PHANTOM_ARITHMETIC"
"""The variable of `megatron_idpo.testing.phantom_gpu`, which this process must not import."""

OUTPUT_LINES = 60
"""Of a step, kept in its result."""

TRL = "trl-"
"""Before the name of a case: TRL's side of it."""

HEAD_SIZE, TINY = "8192x4096x151936", "64x32x512"
"""Targets x hidden size x vocabulary."""


@dataclass(frozen=True)
class Step:
    """One program."""

    name: str
    words: tuple[str, ...]
    """Arguments of the interpreter."""

    expected_s: float
    """It is started only if that much time is left."""

    rehearsed: tuple[str, ...] | None = None
    """Instead, on a phantom GPU; None: the step is not rehearsed."""

    arithmetic: str = "eager"
    """Of the phantom GPU; `none` for shapes that no CPU computes."""


def _step_of(case: str, expected_s: float) -> Step:
    words = ("benchmarks/gpu_step.py", case)
    return Step(case, words, expected_s, (*words, "--steps", "1"), arithmetic="none")


def _trl_step(case: str, expected_s: float) -> Step:
    name = "benchmarks/gpu_trl.py"
    tiny = "tiny-tap" if case.endswith("-tap") else "tiny"
    return Step(f"{TRL}{case}", (name, case), expected_s, (name, tiny, "--steps", "1"))


def _tests(name: str, file: str, expected_s: float, *rehearsed: str) -> Step:
    # Verbose: what has passed is in the output of a step that is ended.
    words = ("-m", "pytest", "-v", "--disable-warnings", "-m", "gpu", file)
    return Step(name, words, expected_s, (*words, *rehearsed))


_HEAD = ("benchmarks/head.py", "--device", "cuda", "--dtypes", "bf16", "--sizes")

STEPS = (
    _tests("tests-training", "tests/train/test_gpu_equals_cpu.py", 60),
    _tests("tests-lora", "tests/mcore/lora/test_frozen_linear.py", 20),
    _step_of("8b-lora-tap", 60),
    Step(
        "head",
        (*_HEAD, HEAD_SIZE, "--resident", HEAD_SIZE),
        40,
        (*_HEAD, TINY, "--memory-size", TINY),
    ),
    _tests("tests-head", "tests/plugin/test_logprobs.py", 60),
    _trl_step("8b-lora-tap", 60),
    _step_of("1b-full-tap", 40),
    _step_of("8b-lora", 40),
    _step_of("1b-lora-tap", 30),
    _step_of("1b-lora", 30),
    _trl_step("1b-lora", 40),
    # Compiles for every case. On a phantom GPU it is dense: long rows would take minutes.
    _tests("tests-attention", "tests/mcore/attention/test_gpu.py", 120, "-k", "not quadratic"),
    _step_of("3b-lora-tap-recompute", 30),
    replace(_trl_step("8b-lora", 60), rehearsed=None),
    replace(_trl_step("1b-lora-tap", 40), rehearsed=None),
    replace(_step_of("tiny-tap", 20), arithmetic="eager"),
)
"""The most valuable first: correctness, memory and speed at 8B with a tap, the head, TRL's speed.

All together take more than the default time: a second call continues.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that have no result yet; returns 1 if one failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--inside"]:
        return _inside_phantom(words[1:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all steps")
    parser.add_argument("--phantom", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps")
    parser.add_argument("--output", type=Path, help="instead of runs/gpu/COMMIT")
    arguments = parser.parse_args(words)
    device = "phantom" if arguments.phantom else _device()
    if device is None:
        print("no GPU: torch.cuda.is_available() is false; --phantom rehearses", file=sys.stderr)
        return 2
    steps = [step for step in STEPS if not arguments.only or step.name in arguments.only]
    if arguments.phantom:
        steps = [replace(step, words=step.rehearsed) for step in steps if step.rehearsed]
    name = _commit() + ("-phantom" if arguments.phantom else "")
    output = arguments.output or ROOT / "runs" / "gpu" / name
    results = run_steps(steps, output, arguments.budget_s, _environment(phantom=arguments.phantom))
    summary = summarize(results, device)
    print(summary)
    if not arguments.phantom:
        slug = re.sub(r"\W+", "-", device).strip("-")
        (RESULTS / f"gpu_{date.today()}_{slug}_{_commit()}.md").write_text(summary)
    return int(any(result["code"] for result in results.values()))


def run_steps(
    steps: Sequence[Step], output: Path, budget_s: float, environment: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Run the steps without a successful result, as long as there is time.

    Args:
        steps: in order.
        output: directory of the results, `NAME.json`.
        budget_s: for all of them.
        environment: of the programs.

    Returns:
        All results in the directory, by the name of their step.
    """
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    has_failed = {step.name: (output / f"{step.name}.json").exists() for step in steps}
    for step in sorted(steps, key=lambda step: has_failed[step.name]):
        file = output / f"{step.name}.json"
        if file.exists() and json.loads(file.read_text())["code"] == 0:
            print(f"{step.name}: done before", flush=True)
            continue
        left_s = deadline - time.monotonic()
        if left_s < step.expected_s:
            print(f"{step.name}: {step.expected_s:.0f} s needed, {left_s:.0f} left", flush=True)
            continue
        result = _run(step, min(left_s, LIMIT * step.expected_s), environment)
        # Renamed, so that a stop does not leave half a file.
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(file)
        print(f"{step.name}: code {result['code']}, {result['wall_s']:.0f} s", flush=True)
    files = sorted(output.glob("*.json"), key=_order)
    return {file.stem: json.loads(file.read_text()) for file in files}


def _order(file: Path) -> tuple[int, str]:
    names = [step.name for step in STEPS]
    return names.index(file.stem) if file.stem in names else len(names), file.stem


def _run(step: Step, limit_s: float, environment: dict[str, str]) -> dict[str, Any]:
    inside: list[str] = []
    if ARITHMETIC in environment:
        inside = [str(Path(__file__)), "--inside"]
        environment = {**environment, ARITHMETIC: step.arithmetic}
    command = [sys.executable, "-W", "ignore", *inside, *step.words]
    start_s = time.monotonic()
    # A group, so that processes which a test has started end with it and free the GPU.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        code, text = 124, f"{text}\nstopped after {limit_s:.0f} s"
    except BaseException:  # Ctrl-C: the group does not receive it, and would keep the GPU
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = text.strip().splitlines()[-OUTPUT_LINES:]
    found = [line for line in lines if line.startswith("{")]
    measured = json.loads(found[-1]) if found and not code else None
    wall_s = time.monotonic() - start_s
    return {"code": code, "wall_s": wall_s, "measured": measured, "output": lines}


def summarize(results: dict[str, dict[str, Any]], device: str) -> str:
    """The results as Markdown."""
    lines = [f"# `make gpu` on {device}", "", f"{date.today()}, commit {_commit()}.", ""]
    if device == "phantom":
        lines += ["A rehearsal without a GPU: memory counts, times mean nothing.", ""]
    measured = {name: result["measured"] for name, result in results.items() if result["measured"]}
    steps = {name: one for name, one in measured.items() if "planned_bytes" in one}
    if steps:
        head = "| case | peak GB | planned GB | reserved GB | GPU used GB | planned total GB "
        lines += [head + "| step s | estimate s | tokens/s | MFU |", "|---" * 10 + "|"]
        for name, one in steps.items():
            names = ("peak", "planned", "reserved", "used", "planned_total")
            sizes = " | ".join(f"{one[f'{each}_bytes'] / 1e9:.2f}" for each in names)
            lines.append(
                f"| {name} | {sizes} | {one['step_s']:.3f} "
                f"| {one['estimated_step_s']:.3f} | {one['tokens_per_s']:,.0f} | {one['mfu']:.1%} |"
            )
    if device != "phantom":  # which runs TRL in another size
        lines += _against_trl(measured)
    if missing := [step.name for step in STEPS if step.name not in results]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    for name, result in results.items():
        if result["code"] or not result["measured"]:
            lines += ["", f"## {name}: code {result['code']}, {result['wall_s']:.0f} s", "", "```"]
            lines += [*result["output"], "```"]
    return "\n".join(lines) + "\n"


def _against_trl(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Pairs per second and peak memory of the cases that TRL has run too."""
    both = [name for name in measured if f"{TRL}{name}" in measured]
    if not both:
        return []
    head = "| case | pairs/s | TRL, pairs/s | ratio | peak GB | TRL, peak GB | Liger |"
    lines = ["", head, "|---" * 7 + "|"]
    for name in both:
        ours, theirs = measured[name], measured[f"{TRL}{name}"]
        speeds = ours["pairs_per_s"], theirs["pairs_per_s"]
        sizes = f"{ours['peak_bytes'] / 1e9:.2f} | {theirs['trl_peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {name} | {speeds[0]:.2f} | {speeds[1]:.2f} | {speeds[0] / speeds[1]:.2f} "
            f"| {sizes} | {'yes' if theirs['liger'] else 'no'} |"
        )
    return lines


def _environment(*, phantom: bool) -> dict[str, str]:
    if not phantom:
        return {**os.environ, "PYTHONPATH": str(ROOT)}
    from megatron_idpo.testing.phantom_gpu import environment

    return environment(arithmetic="eager")


def _inside_phantom(words: list[str]) -> int:
    """Run a program, as the interpreter would, on the phantom GPU of this process."""
    from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

    with suppress_megatron_warnings():
        from megatron_idpo.testing.phantom_gpu.device import phantom

    with phantom():
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            # As the interpreter does for a script: it imports its neighbors.
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    return 0


def _device() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
