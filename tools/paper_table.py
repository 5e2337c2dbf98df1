"""A paper's table, end to end, on any model: measured values next to published ones.

    .venv/bin/python tools/paper_table.py intermediate-dpo|sdpo --output DIR
        [--model PATH] [--data FILE [--data FILE]] [--held-out FILE] [--processes N]
        [--device KIND] [--dry-run] [section.field=value ...]

Writes a configuration for each run and one for the evaluation into `DIR/configs`, prints what the
training needs, and runs the verbs of the package, each in a separate process, after printing its
command. By default all of it fits one GPU. After an interruption the same line continues: finished
commands are skipped, the interrupted one resumes. examples/paper/README.md explains the options.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import paper_cost

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import EVALUATION, SECTIONS
from megatron_idpo.config.yaml_tree import read_tree, write_yaml
from megatron_idpo.errors import EXIT_USER_ERROR, ConfigError, Problem, UserError
from megatron_idpo.evaluate.paper_figures import INTERMEDIATE_PAPER, PAPER_DEPTH, PAPER_WINS
from megatron_idpo.storage.atomic import write_json
from megatron_idpo.train.metrics.intervals import wilson_interval

ROOT: Final = Path(__file__).resolve().parents[1]
EXAMPLES: Final = ROOT / "examples"
FIRST: Final = "sft"
"""Name of the initial model."""

PROMPTS: Final = 40
"""Judged prompts of the intermediate-DPO paper."""

HELD_OUT: Final = 0.05
PROGRESS: Final = "progress.json"
"""Finished commands, in the output directory."""

RESULTS: Final = {"train": "hf", "generate": "answers"} | {
    name: name for name in ("judge", "likelihood", "h4")
}
"""Verb -> what it leaves in its output directory."""

NOTHING: Final = "–"


@dataclass(frozen=True, slots=True)
class Run:
    """A trained model of a table."""

    name: str
    config: Path
    scaled: tuple[str, ...] = ()
    """Overrides if the model is not the paper's."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table."""

    runs: tuple[Run, ...]
    verbs: tuple[str, ...]
    """Verbs to run after training."""


TABLES: Final = {
    "intermediate-dpo": Table(
        (
            Run("dpo", EXAMPLES / "paper/dpo_mistral_7b.yaml"),
            Run("id5", EXAMPLES / "idpo_mistral_7b.yaml", (f"objective.layers=[{PAPER_DEPTH}]",)),
        ),
        ("generate", "judge", "likelihood"),
    ),
    "sdpo": Table(
        (
            Run("dpo", EXAMPLES / "paper/dpo_solar_10b.yaml"),
            Run("sdpo", EXAMPLES / "sdpo_solar_10b.yaml"),
        ),
        ("h4",),
    ),
}
RANDOM_SPLIT: Final = Run("sdpo_random", EXAMPLES / "paper/sdpo_random_solar_10b.yaml")

OURS: Final = {
    "model.path": "--model",
    "data.train": "--data",
    "data.eval": "--held-out",
    "data.eval_fraction": "--held-out",
    "training.output": "--output",
    "objective.layers": "",
    "objective.intermediate_weight": "",
    "evaluate.models": "",
    "evaluate.output": "--output",
    "judge.compare": "",
}
"""Fields that the table sets -> the option that sets them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all commands; returns the exit code."""
    try:
        options = _parser().parse_intermixed_args(argv)
        return paper_table(options)
    except UserError as error:
        print(f"paper_table: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paper_table", description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=tuple(TABLES))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", metavar="PATH", help="instead of the paper's")
    parser.add_argument("--data", action="append", metavar="FILE", help="pairs; of sdpo one a step")
    parser.add_argument("--held-out", metavar="FILE", help="held-out pairs")
    parser.add_argument("--processes", type=int, metavar="N", help="that train")
    devices = ", ".join((*paper_cost.DEVICE_NAMES, paper_cost.THIS_MACHINE))
    parser.add_argument(
        "--device", default=paper_cost.THIS_MACHINE, help=f"of the estimate: {devices}"
    )
    parser.add_argument("--random-split", action="store_true", help="sdpo: a third run")
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser


def paper_table(options: argparse.Namespace) -> int:
    """Write configurations and run commands; returns 0, or the exit code of a failed command.

    Raises:
        UserError: an option or an override is wrong.
    """
    table = TABLES[options.table]
    runs = [*table.runs, *([RANDOM_SPLIT] if options.random_split else [])]
    _check(options)
    configs = {run.name: _write(run, options) for run in runs}
    evaluation = _write_evaluation(runs, configs, options)
    processes = _processes(configs, options)
    has_judge = load_config(evaluation, optional=SECTIONS).judge is not None
    print(f"configurations: {options.output / 'configs'}")
    _print_cost(configs, processes, options)
    steps = commands(table, runs, configs, evaluation, options.output, processes)
    steps = [step for step in steps if has_judge or step.verb != "judge"]
    if code := _run_all(steps, options):
        return code
    if not options.dry_run and options.table == "intermediate-dpo":
        print("\n" + "\n".join(wins_table(options.output / "evaluation", has_judge=has_judge)))
    return 0


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and what it leaves."""

    verb: str
    words: tuple[str, ...]
    config: Path | None = None
    result: Path | None = None
    """None: it is always run again."""

    @property
    def fingerprint(self) -> str:
        """Of the command and its configuration."""
        content = b"" if self.config is None else self.config.read_bytes()
        return hashlib.sha256(shlex.join(self.words).encode() + content).hexdigest()

    def is_finished(self, finished: Sequence[str]) -> bool:
        """Whether it has ended well with the same configuration, and its result exists."""
        has_result = self.result is not None and self.result.exists()
        return has_result and self.fingerprint in finished


def commands(
    table: Table,
    runs: Sequence[Run],
    configs: dict[str, Path],
    evaluation: Path,
    output: Path,
    processes: int,
) -> list[Step]:
    """All commands in order."""
    several = () if processes == 1 else ("--processes", str(processes))
    directory = output / "evaluation"
    steps = []
    for run in runs:
        config, result = configs[run.name], output / run.name / RESULTS["train"]
        words = _program("train", str(config), *several)
        steps.append(Step("train", words, config, result))
    for verb in table.verbs:
        words = _program(verb, str(evaluation), *(several if verb == "likelihood" else ()))
        steps.append(Step(verb, words, evaluation, directory / RESULTS[verb]))
    outputs = [str(output / run.name) for run in runs]
    page = ["--output", str(output / "report.html")]
    words = _program("report", *outputs, str(directory), *page)
    return [*steps, Step("report", words)]


def _program(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "megatron_idpo", *arguments)


def _run_all(steps: Sequence[Step], options: argparse.Namespace) -> int:
    """Run what has not finished yet; returns 0, or the exit code of a failed command."""
    file = options.output / PROGRESS
    finished = json.loads(file.read_text("utf-8")) if file.is_file() else []
    has_trained = False
    for step in steps:
        print(f"\n  {shlex.join(step.words)}", flush=True)
        # Evaluations of a model that was trained again find out by themselves what they keep.
        is_current = step.verb == "train" or not has_trained
        if is_current and step.is_finished(finished):
            print("  finished before", flush=True)
        elif not options.dry_run:
            if code := _run(step.words):
                message = f"\npaper_table: `{step.verb}` ended with exit code {code}; "
                print(f"{message}the same line continues here", file=sys.stderr)
                return code
            has_trained |= step.verb == "train"
            finished.append(step.fingerprint)
            write_json(file, finished)
    return 0


def _run(command: Sequence[str]) -> int:
    """Run a program; returns its exit code."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # the signal reached it as well: it may be saving
        raise


def _processes(configs: dict[str, Path], options: argparse.Namespace) -> int:
    """As given, or as many as one replica of the model needs.

    Raises:
        ConfigError: a layout does not divide them.
    """
    layouts = [load_config(path, optional=SECTIONS).layout for path in configs.values()]
    if options.processes is None:
        return max(layout.min_ranks for layout in layouts)
    for layout in layouts:
        layout.check(None, options.processes)
    return int(options.processes)


def _print_cost(configs: dict[str, Path], processes: int, options: argparse.Namespace) -> None:
    """Print the estimate.

    Raises:
        ConfigError: there is not enough space on the disk.
    """
    try:
        costs = paper_cost.estimate(configs, processes, options.device)
    except ConfigError as error:
        print(f"no estimate: {error}")
        return
    print("\n" + "\n".join(paper_cost.report(costs)))
    if not options.dry_run:
        paper_cost.check_disk(costs, options.output)


# ---- configurations -------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """No override conflicts with the table, and options are consistent.

    Raises:
        ConfigError: lists every conflict.
    """
    problems = []
    for override in options.overrides:
        name = override.partition("=")[0]
        if name in OURS or _section(override) == "sdpo":
            option = OURS.get(name)
            remedy = f"use {option}" if option else "leave it out"
            problems.append(Problem(name, "is set by the table", remedy))
        elif name != "judge" and any(field.startswith(f"{name}.") for field in OURS):
            problems.append(Problem(name, "is partly set by the table", "set single fields of it"))
    if options.random_split and options.table != "sdpo":
        problems.append(Problem("--random-split", "belongs to sdpo", "leave it out"))
    if options.table == "sdpo" and options.data and len(options.data) != 2:
        message = f"has {len(options.data)} files, but there are two steps"
        problems.append(Problem("--data", message, "name two, the easier one first"))
    if options.held_out and not options.data:
        problems.append(Problem("--held-out", "needs --data", "set both"))
    if problems:
        raise ConfigError.of(problems)


def _option_overrides(run: Run, options: argparse.Namespace) -> list[str]:
    """Overrides of a paper's configuration by the options."""
    overrides = [_set("training.output", str(options.output / run.name))]
    paper_ranks = load_config(run.config, optional=SECTIONS).layout.min_ranks
    if options.model or (options.processes or 1) % paper_ranks:
        overrides.append("layout=null")  # every process has the whole model
    if options.model:
        overrides += [_set("model.path", options.model), *run.scaled]
    if options.data:
        overrides += [_set("data.train", options.data), _set("data.eval", options.held_out)]
    if options.data and not options.held_out:
        overrides.append(_set("data.eval_fraction", HELD_OUT))
    return overrides


def _set(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value)}"


def _section(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def _write(run: Run, options: argparse.Namespace) -> Path:
    """Write a run's configuration, without sections of evaluations."""
    trained = [text for text in options.overrides if _section(text) not in EVALUATION]
    return _written(
        run.name, run.config, [*_option_overrides(run, options), *trained], options.output
    )


def _write_evaluation(
    runs: Sequence[Run], configs: dict[str, Path], options: argparse.Namespace
) -> Path:
    """Write the configuration of all verbs after training."""
    base = configs[runs[0].name]
    first = load_config(base, optional=SECTIONS).model.path
    models = {FIRST: first} | {run.name: str(options.output / run.name) for run in runs}
    overrides = [
        _set("evaluate.models", models),
        _set("evaluate.output", str(options.output / "evaluation")),
        _set("generate.max_prompts", PROMPTS),
        *(text for text in options.overrides if _section(text) in EVALUATION),
    ]
    if any(_section(text) == "judge" for text in overrides):
        pairs = [[runs[-1].name, wins.other] for wins in PAPER_WINS]
        overrides.append(_set("judge.compare", pairs))
    return _written("evaluate", base, overrides, options.output)


def _written(name: str, config: Path, overrides: Sequence[str], output: Path) -> Path:
    """Write a configuration with overrides.

    Raises:
        ConfigError: it is invalid.
    """
    load_config(config, overrides, optional=SECTIONS)  # reports all errors with their locations
    path = output / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(read_tree(config, overrides).values), encoding="utf-8")
    return path


# ---- the intermediate-DPO paper's table -----------------------------------------------------


def wins_table(evaluation: Path, *, has_judge: bool) -> list[str]:
    """Win rates of `id5`, measured and published."""
    rows = [("id5 against", "from", "preferred", "95 % interval", "prompts")]
    message = "Nothing was judged: set judge.model=NAME."
    for paper in PAPER_WINS:
        if has_judge:
            file = evaluation / "judge" / f"id5-vs-{paper.other}" / "result.json"
            result = json.loads(file.read_text("utf-8"))
            message = f"measured: judged by {result['judge']}, a tie counts half."
            shares = _shares(result["win_rate"], result["low"], result["high"])
            judged = sum(result[name] for name in ("wins", "losses", "ties"))
            rows.append((paper.other, "measured", *shares, str(judged)))
        share = paper.wins / paper.prompts
        shares = _shares(share, *wilson_interval(share, paper.prompts))
        rows.append((paper.other, "paper", *shares, str(paper.prompts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    note = f"paper: {INTERMEDIATE_PAPER}, Mistral-7B judged by GPT-4; intervals computed by us."
    return [*lines, message, note]


def _shares(share: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    if share is None or low is None or high is None:  # no verdicts
        return NOTHING, NOTHING
    return f"{100 * share:.1f} %", f"{100 * low:.0f} to {100 * high:.0f}"


if __name__ == "__main__":
    sys.exit(main())
