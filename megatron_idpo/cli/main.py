"""The command line: `megatron-idpo VERB ...`, also `python -m megatron_idpo` and under torchrun.

`VERBS` is the table of verbs. Nothing heavy is imported before the verb is known and its arguments
are valid, so that `--help` and typing errors answer at once.

Exit codes (`errors.py`): 0; `EXIT_USER_ERROR` for errors that the user can fix, printed as one
message without a traceback; `EXIT_PEER_LOST` if another process of the run has died;
`EXIT_PREEMPTED` if a signal ended training after a save; 130 for Ctrl-C; an unexpected exception
keeps its traceback (1).
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import shtab

from megatron_idpo import __version__
from megatron_idpo.cli.arguments import (
    Parser,
    add_choice,
    add_config_arguments,
    config_path,
    one_of,
    overrides_first,
    unknown_arguments,
    without_dashes,
)
from megatron_idpo.cli.convert import add_convert_arguments, convert
from megatron_idpo.cli.errors import (
    is_lost_peer,
    is_megatron_import_error,
    report_interrupted,
    report_lost_peer,
    report_user_error,
)
from megatron_idpo.cli.init import add_init_arguments, init
from megatron_idpo.cli.launch import add_processes_argument, launch
from megatron_idpo.cli.limits import check_limits, limit_error
from megatron_idpo.cli.plan import add_plan_arguments, plan
from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

_FIRST_STEPS = "begin with `megatron-idpo init`, or see `megatron-idpo --help`"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = build_parser()
        if not words:
            raise ConfigError(f"no verb given; {_FIRST_STEPS}")
        if not words[0].startswith("-"):
            one_of("verb", VERBS)(words[0])
        arguments, unknown = parser.parse_known_args(overrides_first(without_dashes(words)))
        if unknown:
            raise unknown_arguments(_parser_of(arguments.verb), unknown)
        check_limits()
        # Before the verb's imports: megatron-core prints warnings while it is imported.
        if (processes := getattr(arguments, "processes", None)) is not None:
            return launch(words, processes)
        with suppress_megatron_warnings(), console_logging():
            return VERBS[arguments.verb].run(arguments)
    except UserError as error:
        return report_user_error(error)
    except KeyboardInterrupt:
        return report_interrupted()
    except Exception as error:
        if is_lost_peer(error):
            return report_lost_peer(error)
        if (at_limit := limit_error(error)) is not None:
            return report_user_error(at_limit)
        if not is_megatron_import_error(error):
            raise
        remedy = "`megatron-idpo doctor` shows which library is half installed"
        reason = f"cannot be imported ({type(error).__name__}: {error})"
        return report_user_error(ConfigError.at("megatron-core", reason, remedy))


class _ConsoleHandler(logging.Handler):
    """Plain messages: warnings to stderr from every rank, the rest to stdout from rank 0."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        if is_warning or os.environ.get("RANK", "0") == "0":
            # Looked up here, not at construction: a progress bar replaces the streams meanwhile.
            stream = sys.stderr if is_warning else sys.stdout
            print(self.format(record), file=stream, flush=True)


@contextmanager
def console_logging() -> Iterator[None]:
    """Print this package's log messages within the block."""
    logger, handler = logging.getLogger("megatron_idpo"), _ConsoleHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # A library that configures the root logger would print every message a second time.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its errors are `ConfigError`."""
    parser = Parser(
        prog="megatron-idpo",
        description="Intermediate DPO and stepwise DPO on stock Megatron-Core.",
        epilog="`megatron-idpo VERB --help` shows the arguments of a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-idpo {__version__}")
    shtab.add_argument_to(
        parser, "--print-completion", help="print a script that completes verbs and options"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        inner = verbs.add_parser(
            name,
            help=verb.summary,
            description=verb.summary,
            epilog=f"example: megatron-idpo {verb.example}",
            allow_abbrev=False,
        )
        verb.add_arguments(inner)
    return parser


def _parser_of(verb: str) -> argparse.ArgumentParser:
    """A parser with the arguments of one verb."""
    parser = Parser(prog=f"megatron-idpo {verb}", allow_abbrev=False)
    VERBS[verb].add_arguments(parser)
    return parser


# ---- verbs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verb:
    """One command of the program."""

    summary: str
    """One line for `--help`."""

    example: str
    """A command line, without the program's name."""

    add_arguments: Callable[[argparse.ArgumentParser], None]

    run: Callable[[argparse.Namespace], int]
    """Imports what it needs and returns the exit code."""


def _config_verb(
    function: str,
    summary: str,
    example: str,
    *,
    config_required: bool = True,
    is_distributed: bool = False,
) -> Verb:
    """A verb of the usual form: `VERB CONFIG.yaml [section.field=value ...]`.

    Args:
        function: `module:name`, in this package, of `main(config_path, overrides) -> int`; it is
            imported when it runs.
        summary: one line for `--help`.
        example: a command line.
        config_required: whether the path may not be None.
        is_distributed: whether it runs in several processes, which `--processes` starts.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_config_arguments(parser, required=config_required)
        if is_distributed:
            add_processes_argument(parser)

    def run(arguments: argparse.Namespace) -> int:
        path = config_path(arguments)
        module, _, name = function.partition(":")
        main = getattr(importlib.import_module(f"megatron_idpo.{module}"), name)
        return int(main(path, arguments.overrides))

    return Verb(summary, example, add_arguments, run)


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=False)
    help_nodes = "also whether the machines of a run work together; under torchrun, or with:"
    parser.add_argument("--nodes", action="store_true", help=help_nodes)
    number = "number of machines; starts the processes on this one, once all have come"
    parser.add_argument("--nnodes", type=int, metavar="N", help=number)
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="of this machine")
    parser.add_argument("--master-addr", metavar="HOST", help="the machine with rank 0")
    parser.add_argument("--master-port", type=int, default=29500, metavar="PORT")
    help_processes = "per machine (default 2)"
    parser.add_argument("--nproc-per-node", type=int, default=2, metavar="N", help=help_processes)
    help_wait = "seconds to wait for the machines (default 120)"
    parser.add_argument("--wait", type=float, default=120.0, metavar="S", help=help_wait)


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_idpo.doctor.main import main as doctor
    from megatron_idpo.doctor.roll_call import Meeting

    meeting = None
    if arguments.nnodes is not None:
        meeting = Meeting(
            nnodes=arguments.nnodes,
            node_rank=arguments.node_rank,
            master_addr=arguments.master_addr or "localhost",
            master_port=arguments.master_port,
            nproc_per_node=arguments.nproc_per_node,
            wait_s=arguments.wait,
        )
    return doctor(
        config_path(arguments), arguments.overrides, nodes=arguments.nodes, meeting=meeting
    )


def _add_sdpo_arguments(parser: argparse.ArgumentParser) -> None:
    help_action = "status: state, result and size of each step, and the next one"
    add_choice(parser, "action", ["status"], help=help_action)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's training.output")
    help_check = "also verify every byte of the snapshots"
    parser.add_argument("--check", action="store_true", help=help_check)


def _sdpo(arguments: argparse.Namespace) -> int:
    from megatron_idpo.sdpo.status import main as status

    return status(arguments.run, check=arguments.check)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    help_runs = "training.output of a run or directory of an evaluation; several are compared"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=help_runs)
    help_output = "the page (default: report.html in the first RUN)"
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=help_output)


def _report(arguments: argparse.Namespace) -> int:
    from megatron_idpo.evaluate.report.main import main as report

    return report(arguments.runs, arguments.output)


VERBS: dict[str, Verb] = {
    "init": Verb(
        "Write a commented configuration to start from.",
        "init lora idpo.yaml",
        add_init_arguments,
        init,
    ),
    "doctor": Verb(
        "Check this machine and its libraries, and whether a configuration can run.",
        "doctor idpo.yaml",
        _add_doctor_arguments,
        _doctor,
    ),
    "plan": Verb(
        "Plan memory and time of a run before it is started; find layouts that fit.",
        "plan idpo.yaml --gpus 8 --device h100",
        add_plan_arguments,
        plan,
    ),
    "data": _config_verb(
        "data.inspect.main:main",
        "Show the data as the model sees it: lengths, packing, sample pairs.",
        "data idpo.yaml data.max_length=2048",
    ),
    "score": _config_verb(
        "cli.train:score",
        "Compute the reference log-probabilities ahead of training.",
        "score idpo.yaml objective.layers=all",
        is_distributed=True,
    ),
    "train": _config_verb(
        "cli.train:main",
        "Train with DPO or intermediate DPO; resume if interrupted; export the model.",
        "train idpo.yaml optimizer.lr=1e-4 --processes 2",
        is_distributed=True,
    ),
    "sdpo": Verb(
        "Show the state of a stepwise DPO run.",
        "sdpo status runs/idpo --check",
        _add_sdpo_arguments,
        _sdpo,
    ),
    "likelihood": _config_verb(
        "evaluate.likelihood.main:main",
        "Measure preference accuracy at every layer of one or several models.",
        "likelihood idpo.yaml evaluate.models='{sft: base, dpo: runs/idpo/hf}'",
        is_distributed=True,
    ),
    "advise": _config_verb(
        "evaluate.likelihood.advise:main",
        "Suggest layers to tap from the likelihood curves.",
        "advise idpo.yaml",
    ),
    "generate": _config_verb(
        "evaluate.generate.run:main",
        "Generate answers from one or several models.",
        "generate idpo.yaml generate.prompts=prompts.jsonl",
        is_distributed=True,
    ),
    "judge": _config_verb(
        "evaluate.judge.run:main",
        "Compare answers pairwise with a judge; report win rates.",
        "judge idpo.yaml judge.model=gpt-4o",
    ),
    "h4": _config_verb(
        "evaluate.lm_eval.run:main",
        "Evaluate on ARC, HellaSwag, MMLU and TruthfulQA with lm-eval.",
        "h4 idpo.yaml h4.tasks='[arc_challenge]'",
    ),
    "report": Verb(
        "Write runs and their evaluations as one self-contained HTML page.",
        "report runs/idpo runs/second --output report.html",
        _add_report_arguments,
        _report,
    ),
    "convert": Verb(
        "Convert weights between Hugging Face and Megatron-Core.",
        "convert hf-to-megatron path/to/model megatron/",
        add_convert_arguments,
        convert,
    ),
}
"""Every verb by name, in the order of the work, which is that of `--help`."""
