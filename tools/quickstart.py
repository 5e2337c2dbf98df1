"""The quickstart: a real model, trained here and now, and what came of it.

    make quickstart                                      or, after `make setup`,
    .venv/bin/python tools/quickstart.py [section.field=value ...]

Makes the model (`smollm2.py`), trains it as `examples/quickstart.yaml` says on two processes, lets
the model from before and the one from after answer a question that neither was trained on, and ends
with figures and commands. What it says is read from files that are there; a second call goes on
where the first one ended.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from megatron_idpo.config import SECTIONS, RunConfig, load_config
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError, UserError
from megatron_idpo.train.log_line import accuracy_told, clock_time
from megatron_idpo.train.metric_names import (
    ACCURACY,
    EVAL,
    EVAL_PAIRS,
    LOSS,
    MARGIN,
    layer_name,
    layers_in,
)
from megatron_idpo.train.metrics_file import STEP, Record, read_metrics

if TYPE_CHECKING:
    from megatron_idpo.train.output import RunDirectory

ROOT: Final = Path(__file__).resolve().parents[1]
CONFIG: Final = Path("examples/quickstart.yaml")
REQUIRED: Final = ("model", "data", "training")
PROCESSES: Final = 2
QUESTION: Final = 31
"""Which held-out question is asked, from 1: one whose answers are short, as it says."""

EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Everything, in order; returns the exit code."""
    overrides = sys.argv[1:] if argv is None else list(argv)
    os.chdir(ROOT)  # the paths in the configuration are the checkout's
    console = Console(highlight=False)
    try:
        return quickstart(console, overrides)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def quickstart(console: Console, overrides: Sequence[str]) -> int:
    """The steps; returns 0, or the exit code of the one that failed.

    Raises:
        UserError: the configuration is wrong, or something that should be there is not.
    """
    config = load_config(
        CONFIG, overrides, required=("model", "data", "training"), optional=SECTIONS
    )
    root = Path(config.training.output)
    began = time.perf_counter()

    step(console, "1. The model")
    if code := run(smollm2_command(config)):
        return code

    step(console, "2. Training")
    if root.exists():
        console.print(
            f"{root} is there: training goes on from where it was, and where it had ended "
            f"nothing is trained again. To begin anew: rm -r {root}",
            soft_wrap=True,
        )
    command = training_command(overrides)
    console.print(shown(command), soft_wrap=True)
    if code := run(command):
        return code
    from megatron_idpo.train.output import RunDirectory  # torch: when training needs no memory

    output = RunDirectory(root)
    lines = [*figures(read_metrics(output.metrics)), "", *uses(config, output)]

    step(console, f"3. Held-out question {QUESTION} (picked for its short answers, not at random)")
    if code := run(ask_command(config, output)):
        return code

    step(console, "4. What came of it")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"\nThe quickstart took {clock_time(time.perf_counter() - began)}.")
    return 0


def step(console: Console, title: str) -> None:
    """A heading."""
    console.print(f"\n[bold]{title}[/bold]")


def run(command: Sequence[str]) -> int:
    """Runs a program that speaks for itself; its exit code."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // PROCESSES)))
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was interrupted as well, and may have something to save
        raise


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- commands -------------------------------------------------------------------------------


def python() -> str:
    """This Python as one would type it in the checkout."""
    path = Path(sys.executable)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def smollm2_command(config: RunConfig) -> list[str]:
    """Makes the model where the configuration looks for it."""
    return [python(), "tools/smollm2.py", config.model.path]


def training_command(overrides: Sequence[str]) -> list[str]:
    """`torchrun`, by its module: the script beside Python breaks when a checkout is moved."""
    launcher = [python(), "-m", "torch.distributed.run", "--standalone"]
    train = ["-m", "megatron_idpo", "train", str(CONFIG), *overrides]
    return [*launcher, f"--nproc-per-node={PROCESSES}", *train]


def ask_command(config: RunConfig, output: "RunDirectory") -> list[str]:
    """Lets the model from before and the one from after answer a held-out question.

    Raises:
        ConfigError: the configuration holds no file out.
    """
    if not config.data.eval:
        raise ConfigError.at("data.eval", "names no file", "leave it as the quickstart has it")
    with Path(config.data.eval[0].path).open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    asked = str(pairs[QUESTION - 1]["prompt"][-1]["content"])
    return [python(), "tools/compare_answers.py", config.model.path, str(output.hf), asked]


def plain_dpo_command(output: "RunDirectory") -> list[str]:
    """The same training without intermediate layers, beside the other."""
    plain = ["objective.layers=[]", "objective.intermediate_weight=0"]
    return training_command([*plain, f"training.output={output.root}-plain-dpo"])


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return "  " + shlex.join(command)


# ---- what came of it ------------------------------------------------------------------------


def figures(records: Sequence[Record]) -> list[str]:
    """Held-out accuracy, margins and loss before the first and after the last step, as a table."""
    evaluations = [record for record in records if f"{EVAL}{LOSS}" in record]
    if len(evaluations) < 2:
        raise ConfigError.at(
            "training.output",
            "its metrics.jsonl has no held-out figures from before and after training",
            "remove the directory and run this again",
        )
    before, after = evaluations[0], evaluations[-1]
    pairs = after[EVAL_PAIRS]
    rows = [
        (f"{pairs:.0f} held-out pairs", f"step {before[STEP]:.0f}", f"step {after[STEP]:.0f}"),
        ("  reward accuracy, 95% interval", *(_accuracy(at, pairs) for at in (before, after))),
        ("  reward margin", *(f"{at[EVAL + MARGIN]:+.3f}" for at in (before, after))),
    ]
    for layer in layers_in(after):
        name = EVAL + layer_name(layer, MARGIN)
        rows.append((f"  at layer {layer}", *(f"{at[name]:+.3f}" for at in (before, after))))
    rows.append(("  loss", *(f"{at[EVAL + LOSS]:.4f}" for at in (before, after))))
    lines = [f"{label:34}{first:>10}   {last}" for label, first, last in rows]
    if before[EVAL + MARGIN] == 0:
        lines.append("Before training policy and reference are equal: every pair is a tie.")
    return lines


def _accuracy(record: Record, pairs: float) -> str:
    return accuracy_told(record[EVAL + ACCURACY], record[EVAL + MARGIN], pairs)


@dataclass(frozen=True, slots=True)
class Use:
    """Something to do with the result: what for, how, and the files that it takes."""

    purpose: str
    how: str
    files: tuple[Path, ...]


def uses(config: RunConfig, output: "RunDirectory") -> list[str]:
    """What lies where and the commands that use it.

    Raises:
        ConfigError: a file that would be named is not there.
    """
    model = Path(config.model.path)
    ask, plain = ask_command(config, output), plain_dpo_command(output)
    found = [
        Use("the model for Transformers, adapters merged", f"  {output.hf}", (output.hf,)),
        Use("the adapter for PEFT", f"  {output.adapter}", (output.adapter,)),
        Use("how training went", f"  {output.curves}", (output.curves, output.metrics)),
        Use("ask both another question", shown(ask), (model, output.hf)),
        Use("the same without intermediate layers", shown(plain), (CONFIG,)),
    ]
    missing = [str(path) for use in found for path in use.files if not path.exists()]
    if missing:
        told = f"training left no {', '.join(missing)}"
        raise ConfigError.at("training.output", told, f"remove {output.root} and run this again")
    return [line for use in found for line in (f"{use.purpose}:", use.how)]


if __name__ == "__main__":
    sys.exit(main())
