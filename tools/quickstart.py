"""The quickstart: a real model, trained here and now, and what came of it.

    make quickstart, make quickstart-sdpo                or, after `make setup`,
    .venv/bin/python tools/quickstart.py [CONFIG.yaml] [section.field=value ...]

Makes the model (`smollm2.py`), trains it on two processes as `examples/quickstart.yaml` says, or
another configuration that is named first, lets the model from before and the one from after answer
a question that neither was trained on, and ends with figures and commands. What it says is read
from files that are there; a second call goes on where the first one ended.
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

from megatron_idpo.config.run_config import SECTIONS, RunConfig, load_config
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError, UserError
from megatron_idpo.train.logging.line import clock_time, format_accuracy
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
"""Of a run in steps: the first one's result, by its place in `training.output`."""

AGAINST_FIRST: Final = (
    "Against itself the first model has margin 0, and every pair is a tie: the columns `vs first`\n"
    "say what was gained since. The others compare each step to the one before it."
)

QUESTION: Final = 31
"""Which held-out question is asked, from 1: one whose answers are short, as it says."""

EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Everything, in order; returns the exit code."""
    overrides = sys.argv[1:] if argv is None else list(argv)
    path = CONFIG
    if overrides and overrides[0].endswith(".yaml") and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    os.chdir(ROOT)  # the paths in the configuration are the checkout's
    console = Console(highlight=False)
    try:
        return quickstart(console, overrides, path)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def quickstart(console: Console, overrides: Sequence[str], path: Path = CONFIG) -> int:
    """The parts; returns 0, or the exit code of the one that failed.

    Raises:
        UserError: the configuration is wrong, or something that should be there is not.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=SECTIONS)
    root = Path(config.training.output)
    began = time.perf_counter()

    heading(console, "1. The model")
    if code := run(smollm2_command(config)):
        return code

    heading(console, "2. Training")
    if root.exists():
        console.print(
            f"{root} is there: training goes on from where it was, and where it had ended "
            f"nothing is trained again. To begin anew: rm -r {root}",
            soft_wrap=True,
        )
    command = training_command(overrides, path)
    console.print(shown(command), soft_wrap=True)
    if code := run(command):
        return code
    from megatron_idpo.train.run_directory import (
        RunDirectory,  # torch: when training needs no memory
    )

    output = RunDirectory(root)
    if config.sdpo is None:
        lines = [*figures(read_metrics(output.metrics)), "", *uses(config, output)]
    else:
        lines = [AGAINST_FIRST, "", *uses_of_steps(config.sdpo, config, output)]

    title = f"3. Held-out question {QUESTION} (picked for its short answers, not at random)"
    heading(console, title)
    if code := run(ask_command(config, output)):
        return code

    heading(console, "4. What came of it")
    if config.sdpo is not None and (code := run(status_command(output))):
        return code
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"\nThe quickstart took {clock_time(time.perf_counter() - began)}.")
    return 0


def heading(console: Console, title: str) -> None:
    """What comes now."""
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


def training_command(overrides: Sequence[str], path: Path = CONFIG) -> list[str]:
    """`torchrun`, by its module: the script beside Python breaks when a checkout is moved."""
    launcher = [python(), "-m", "torch.distributed.run", "--standalone"]
    train = ["-m", "megatron_idpo", "train", str(path), *overrides]
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


def status_command(output: "RunDirectory", *options: str) -> list[str]:
    """Shows what has become of each step, with its figures."""
    return [python(), "-m", "megatron_idpo", "sdpo", "status", str(output.root), *options]


def snapshot_command(output: "RunDirectory") -> list[str]:
    """Makes a Hugging Face model of step 1's snapshot."""
    convert = ["-m", "megatron_idpo", "convert", "megatron-to-hf"]
    return [python(), *convert, str(output.root / SNAPSHOT), f"{output.root}-step-1"]


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
    return format_accuracy(record[EVAL + ACCURACY], record[EVAL + MARGIN], pairs)


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
    plain = plain_dpo_command(output)
    return summary(
        output,
        [
            Use("the model for Transformers, adapters merged", f"  {output.hf}", (output.hf,)),
            Use("the adapter for PEFT", f"  {output.adapter}", (output.adapter,)),
            Use("how training went", f"  {output.curves}", (output.curves, output.metrics)),
            _ask_use(config, output),
            Use("the same without intermediate layers", shown(plain), (CONFIG,)),
        ],
    )


def uses_of_steps(sdpo: SdpoConfig, config: RunConfig, output: "RunDirectory") -> list[str]:
    """The same of a run in steps.

    Raises:
        ConfigError: a file that would be named is not there.
    """
    report, picture = output.root / "curriculum.md", output.root / "curriculum.png"
    found = [
        Use("the model for Transformers, adapters merged", f"  {output.hf}", (output.hf,)),
        Use("what each step got and gained", f"  {picture}", (picture,)),
        Use("the same in words", f"  {report}", (report,)),
        Use("how training went, step after step", f"  {output.curves}", (output.curves,)),
        _ask_use(config, output),
    ]
    if sdpo.keep_snapshots == "all" and (config.lora is None or sdpo.adapters == "merge"):
        command, file = snapshot_command(output), output.root / SNAPSHOT / "metadata.json"
        found.append(Use("the model after step 1, for Transformers", shown(command), (file,)))
    check = status_command(output, "--check")
    found.append(Use("whether a byte of a snapshot has changed", shown(check), (output.root,)))
    return summary(output, found)


def summary(output: "RunDirectory", uses: Sequence[Use]) -> list[str]:
    """Lines about uses.

    Raises:
        ConfigError: a file that would be named is not there.
    """
    missing = [str(path) for use in uses for path in use.files if not path.exists()]
    if missing:
        lacking = f"training left no {', '.join(missing)}"
        raise ConfigError.at("training.output", lacking, f"remove {output.root} and run this again")
    return [line for use in uses for line in (f"{use.purpose}:", use.how)]


def _ask_use(config: RunConfig, output: "RunDirectory") -> Use:
    ask = shown(ask_command(config, output))
    return Use("ask both another question", ask, (Path(config.model.path), output.hf))


if __name__ == "__main__":
    sys.exit(main())
