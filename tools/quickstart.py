"""The quickstart: trains a small real model on two CPU processes and shows the results.

    make quickstart, make quickstart-sdpo                or, after `make setup`,
    .venv/bin/python tools/quickstart.py [CONFIG.yaml] [section.field=value ...]

1. Builds the model (`smollm2.py`). 2. Trains it with `examples/quickstart.yaml`, or the given
configuration. 3. Asks the untrained and the trained model a held-out question. 4. Prints held-out
metrics, the output files and the next commands, all read from files that exist. A second call
resumes an interrupted one.
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

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.console.text import format_duration
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError, UserError
from megatron_idpo.train.logging.line import format_accuracy
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EVAL,
    EVAL_PAIRS,
    LOSS,
    MARGIN,
    layer_name,
    layers_in,
)

if TYPE_CHECKING:
    from megatron_idpo.train.run_directory import RunDirectory

ROOT: Final = Path(__file__).resolve().parents[1]
CONFIG: Final = Path("examples/quickstart.yaml")
REQUIRED: Final = ("model", "data", "training")
PROCESSES: Final = 2
SNAPSHOT: Final = Path("snapshots/step-1")
"""The result of step 1 of an sDPO run, relative to `training.output`."""

AGAINST_FIRST: Final = (
    "Columns `vs first` compare each step with the first model, whose margin against itself is 0\n"
    "(every pair is a tie). The other columns compare each step with the previous one."
)

QUESTION: Final = 31
"""Index from 1 of the held-out question, chosen for its short answers."""

EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; return the exit code."""
    overrides = sys.argv[1:] if argv is None else list(argv)
    path = CONFIG
    if overrides and overrides[0].endswith(".yaml") and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    os.chdir(ROOT)  # paths in the configuration are relative to the checkout
    console = Console(highlight=False)
    try:
        return quickstart(console, overrides, path)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def quickstart(console: Console, overrides: Sequence[str], path: Path = CONFIG) -> int:
    """Run all parts; return 0, or the exit code of the part that failed.

    Raises:
        UserError: the configuration is invalid, or an expected file is missing.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=SECTIONS)
    root = Path(config.training.output)
    start_s = time.perf_counter()

    heading(console, "1. The model")
    if code := run(smollm2_command(config)):
        return code

    heading(console, "2. Training")
    if root.exists():
        console.print(
            f"{root} exists: training resumes from its last checkpoint; a finished run is not "
            f"trained again. To start over: rm -r {root}",
            soft_wrap=True,
        )
    command = training_command(overrides, path)
    console.print(shown(command), soft_wrap=True)
    if code := run(command):
        return code
    from megatron_idpo.train.run_directory import (
        RunDirectory,  # imports torch, whose memory the training needed until here
    )

    output = RunDirectory(root)
    if config.sdpo is None:
        lines = [*metrics_table(read_metrics(output.metrics)), "", *next_steps(config, output)]
    else:
        lines = [AGAINST_FIRST, "", *next_steps_of_sdpo(config.sdpo, config, output)]

    title = f"3. Held-out question {QUESTION} (chosen for its short answers)"
    heading(console, title)
    if code := run(ask_command(config, output)):
        return code

    heading(console, "4. Results")
    if config.sdpo is not None and (code := run(status_command(output))):
        return code
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"\nThe quickstart took {format_duration(time.perf_counter() - start_s)}.")
    return 0


def heading(console: Console, title: str) -> None:
    """Print the title of a part."""
    console.print(f"\n[bold]{title}[/bold]")


def run(command: Sequence[str]) -> int:
    """Run a program that prints its own output; return its exit code."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // PROCESSES)))
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads})
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # it received the interrupt too, and may be saving
        raise


def cores() -> int:
    """Cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- commands -------------------------------------------------------------------------------


def python() -> str:
    """This Python, as typed in the checkout."""
    path = Path(sys.executable)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def smollm2_command(config: RunConfig) -> list[str]:
    """Builds the model at the configured path."""
    return [python(), "tools/smollm2.py", config.model.path]


def training_command(overrides: Sequence[str], path: Path = CONFIG) -> list[str]:
    """Trains with the command line; by its module, which a moved checkout has too."""
    train = ["-m", "megatron_idpo", "train", str(path), *overrides]
    return [python(), *train, "--processes", str(PROCESSES)]


def ask_command(config: RunConfig, output: "RunDirectory") -> list[str]:
    """Asks the untrained and the trained model a held-out question.

    Raises:
        ConfigError: the configuration has no held-out data.
    """
    if not config.data.eval:
        raise ConfigError.at("data.eval", "names no file", "keep the quickstart's value")
    with Path(config.data.eval[0].path).open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    question = str(pairs[QUESTION - 1]["prompt"][-1]["content"])
    return [python(), "tools/compare_answers.py", config.model.path, str(output.hf), question]


def plain_dpo_command(output: "RunDirectory") -> list[str]:
    """The same training without intermediate layers, into another directory."""
    plain = ["objective.layers=[]", "objective.intermediate_weight=0"]
    return training_command([*plain, f"training.output={output.root}-plain-dpo"])


def report_command(output: "RunDirectory") -> list[str]:
    """Writes the report page."""
    return [python(), "-m", "megatron_idpo", "report", str(output.root)]


def status_command(output: "RunDirectory", *options: str) -> list[str]:
    """Shows the state and metrics of each step."""
    return [python(), "-m", "megatron_idpo", "sdpo", "status", str(output.root), *options]


def snapshot_command(output: "RunDirectory") -> list[str]:
    """Converts the snapshot of step 1 to a Hugging Face model."""
    convert = ["-m", "megatron_idpo", "convert", "megatron-to-hf"]
    return [python(), *convert, str(output.root / SNAPSHOT), f"{output.root}-step-1"]


def shown(command: Sequence[str]) -> str:
    """A command as typed in a shell."""
    return "  " + shlex.join(command)


# ---- results --------------------------------------------------------------------------------


def metrics_table(records: Sequence[Record]) -> list[str]:
    """A table of held-out accuracy, margins and loss before and after training."""
    evaluations = [record for record in records if f"{EVAL}{LOSS}" in record]
    if len(evaluations) < 2:
        raise ConfigError.at(
            "training.output",
            "its metrics.jsonl lacks held-out metrics from before or after training",
            "remove the directory and run this again",
        )
    before, after = evaluations[0], evaluations[-1]
    pairs = after[EVAL_PAIRS]
    rows = [
        (f"{pairs:.0f} held-out pairs", f"step {before[STEP]:.0f}", f"step {after[STEP]:.0f}"),
        (
            "  reward accuracy, 95% interval",
            *(_accuracy(record, pairs) for record in (before, after)),
        ),
        ("  reward margin", *(f"{record[EVAL + MARGIN]:+.3f}" for record in (before, after))),
    ]
    for layer in layers_in(after):
        name = EVAL + layer_name(layer, MARGIN)
        rows.append(
            (f"  at layer {layer}", *(f"{record[name]:+.3f}" for record in (before, after)))
        )
    rows.append(("  loss", *(f"{record[EVAL + LOSS]:.4f}" for record in (before, after))))
    lines = [f"{label:34}{first:>10}   {last}" for label, first, last in rows]
    if before[EVAL + MARGIN] == 0:
        lines.append("Before training, policy and reference are equal: every pair is a tie.")
    return lines


def _accuracy(record: Record, pairs: float) -> str:
    return format_accuracy(record[EVAL + ACCURACY], record[EVAL + MARGIN], pairs)


@dataclass(frozen=True, slots=True)
class NextStep:
    """Something to do with the result: purpose, path or command, and the files it needs."""

    purpose: str
    path_or_command: str
    files: tuple[Path, ...]


def next_steps(config: RunConfig, output: "RunDirectory") -> list[str]:
    """Output files and commands after a run.

    Raises:
        ConfigError: a file to be named does not exist.
    """
    plain = plain_dpo_command(output)
    return summary(
        output,
        [
            NextStep("the model for Transformers, adapters merged", f"  {output.hf}", (output.hf,)),
            NextStep("the adapter for PEFT", f"  {output.adapter}", (output.adapter,)),
            NextStep("training curves", f"  {output.curves}", (output.curves, output.metrics)),
            NextStep("a page with all results", shown(report_command(output)), (output.metrics,)),
            _ask_step(config, output),
            NextStep("the same training without intermediate layers", shown(plain), (CONFIG,)),
        ],
    )


def next_steps_of_sdpo(sdpo: SdpoConfig, config: RunConfig, output: "RunDirectory") -> list[str]:
    """Output files and commands after an sDPO run.

    Raises:
        ConfigError: a file to be named does not exist.
    """
    report, picture = output.root / "curriculum.md", output.root / "curriculum.png"
    steps = [
        NextStep("the model for Transformers, adapters merged", f"  {output.hf}", (output.hf,)),
        NextStep("data and gain of each step, as a figure", f"  {picture}", (picture,)),
        NextStep("the same as text", f"  {report}", (report,)),
        NextStep("training curves of all steps", f"  {output.curves}", (output.curves,)),
        _ask_step(config, output),
    ]
    if sdpo.keep_snapshots == "all" and (config.lora is None or sdpo.adapters == "merge"):
        command, file = snapshot_command(output), output.root / SNAPSHOT / "metadata.json"
        steps.append(NextStep("the model after step 1, for Transformers", shown(command), (file,)))
    check = status_command(output, "--check")
    steps.append(NextStep("check the snapshots for changed bytes", shown(check), (output.root,)))
    return summary(output, steps)


def summary(output: "RunDirectory", steps: Sequence[NextStep]) -> list[str]:
    """The lines to print.

    Raises:
        ConfigError: a file to be named does not exist.
    """
    missing = [str(path) for step in steps for path in step.files if not path.exists()]
    if missing:
        message = f"training did not write {', '.join(missing)}"
        raise ConfigError.at("training.output", message, f"remove {output.root} and run this again")
    return [line for step in steps for line in (f"{step.purpose}:", step.path_or_command)]


def _ask_step(config: RunConfig, output: "RunDirectory") -> NextStep:
    ask = shown(ask_command(config, output))
    return NextStep("ask both models another question", ask, (Path(config.model.path), output.hf))


if __name__ == "__main__":
    sys.exit(main())
