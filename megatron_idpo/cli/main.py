"""The command line: `megatron-idpo VERB ...`, also `python -m megatron_idpo` and under torchrun.

A table of verbs, what each one takes, and how a failure is told. Nothing heavy is imported before
the verb is known and its arguments are right, so `--help` and a typing mistake answer at once. The
work itself is each verb's own room's.

Exit codes (`errors.py`): 0; `EXIT_USER_ERROR` for everything that is the user's to mend, told in
one message without a traceback; `EXIT_PEER_LOST` where another process of the run has died;
`EXIT_PREEMPTED` where a signal ended training, saved; 130 for Ctrl-C; an unexpected exception keeps
its traceback (1).
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_idpo import __version__
from megatron_idpo.cli.choices import one_of
from megatron_idpo.cli.convert import add_convert_arguments, convert
from megatron_idpo.cli.errors import (
    is_lost_peer,
    report_interrupted,
    report_lost_peer,
    report_user_error,
    stopped_an_import_of_megatron,
)
from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.mcore.megatron_warnings import quiet_megatron


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
            raise ConfigError(f"no verb given; the verbs are {', '.join(VERBS)}")
        if not words[0].startswith("-"):
            one_of("verb", VERBS)(words[0])
        arguments = parser.parse_args(words)
        with quiet_megatron():  # from the first import on
            return VERBS[arguments.verb].run(arguments)
    except UserError as error:
        return report_user_error(error)
    except KeyboardInterrupt:
        return report_interrupted()
    except Exception as error:
        if is_lost_peer(error):
            return report_lost_peer(error)
        if not stopped_an_import_of_megatron(error):
            raise
        remedy = "`megatron-idpo doctor` tells which library is half installed"
        reason = f"cannot be imported ({type(error).__name__}: {error})"
        return report_user_error(ConfigError.at("megatron-core", reason, remedy))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line as one parser; its mistakes raise `ConfigError`."""
    parser = _Parser(
        prog="megatron-idpo",
        description="Intermediate DPO and stepwise DPO on stock Megatron-Core.",
        epilog="`megatron-idpo VERB --help` tells what a verb takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-idpo {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verb.add_arguments(
            verbs.add_parser(name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        )
    return parser


# ---- the verbs ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing the program does."""

    summary: str
    """One line for `--help`."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Declares what the verb takes."""

    run: Callable[[argparse.Namespace], int]
    """Does it; imports what it needs; returns the exit code."""


def _config_verb(module: str, summary: str, *, config_required: bool = True) -> Verb:
    """A verb of the usual shape: `VERB CONFIG.yaml [section.field=value ...]`.

    Args:
        module: where `main(config_path, overrides) -> int` is; imported when the verb runs.
        summary: one line for `--help`.
        config_required: whether the verb means nothing without a config; if not, `main` may be
            given None.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "config",
            type=Path,
            nargs=None if config_required else "?",
            metavar="CONFIG.yaml",
            help="the run's configuration",
        )
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="section.field=value",
            help="replaces one field of the configuration, e.g. layout.tensor=2",
        )

    def run(arguments: argparse.Namespace) -> int:
        config: Path | None = arguments.config
        if config is not None and "=" in config.name and not config.exists():
            remedy = "give the configuration file first, then the fields to replace"
            raise ConfigError.at(str(config), "there is no configuration to override", remedy)
        for override in arguments.overrides:
            if "=" not in override:
                remedy = "write section.field=value, e.g. layout.tensor=2"
                raise ConfigError.at(override, "is no override", remedy)
        code: int = importlib.import_module(module).main(config, arguments.overrides)
        return code

    return Verb(summary, add_arguments, run)


_SDPO_ACTIONS = ("status",)


def _add_sdpo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        type=one_of("action", _SDPO_ACTIONS),
        metavar="|".join(_SDPO_ACTIONS),
        help="status: each step's state, result and size, and what would happen next",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's training.output")
    parser.add_argument(
        "--check", action="store_true", help="also compare every byte of the snapshots"
    )


def _sdpo(arguments: argparse.Namespace) -> int:
    from megatron_idpo.sdpo.status import main as status

    return status(arguments.run, check=arguments.check)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's training.output or an evaluation's directory; several are compared",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="the page (default: report.html in the first RUN)",
    )


def _report(arguments: argparse.Namespace) -> int:
    from megatron_idpo.evaluate.report.main import main as report

    return report(arguments.runs, arguments.output)


VERBS: dict[str, Verb] = {
    "train": _config_verb(
        "megatron_idpo.cli.train",
        "Train by DPO or intermediate DPO; go on where an earlier run ended; export the result.",
    ),
    "score": _config_verb(
        "megatron_idpo.cli.score",
        "Compute the reference log-probabilities of a configuration, at every layer it names.",
    ),
    "convert": Verb(
        "Convert weights between Hugging Face and Megatron-Core.", add_convert_arguments, convert
    ),
    "sdpo": Verb("Look at a run of several steps.", _add_sdpo_arguments, _sdpo),
    "likelihood": _config_verb(
        "megatron_idpo.evaluate.likelihood.main",
        "Read held-out pairs at every layer of one or several models: curves with intervals.",
    ),
    "advise": _config_verb(
        "megatron_idpo.evaluate.likelihood.advise",
        "Rank layers for a loss of their own, from the curves.",
    ),
    "generate": _config_verb(
        "megatron_idpo.evaluate.generate.main", "Let models answer prompts, for a judge to compare."
    ),
    "judge": _config_verb(
        "megatron_idpo.evaluate.judge.main", "Have answers compared two by two; tell who wins."
    ),
    "h4": _config_verb(
        "megatron_idpo.evaluate.lm_eval.main", "ARC, HellaSwag, MMLU and TruthfulQA, by lm-eval."
    ),
    "report": Verb(
        "Put runs and their evaluations on one self-contained page.",
        _add_report_arguments,
        _report,
    ),
    "data": _config_verb("megatron_idpo.data.inspect.main", "Show what the data becomes."),
    "doctor": _config_verb(
        "megatron_idpo.doctor.main",
        "Tell what this machine has, what is missing, and whether a configuration can run here.",
        config_required=False,
    ),
}
"""Every verb, by name, in the order of `--help`."""


# ---- telling a failure ----------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, telling a mistake the way every other mistake is told."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")
