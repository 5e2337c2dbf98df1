"""The models that are evaluated, where they are, and where their results go.

OUTPUT/                    `evaluate.output`, by default `evaluation` in a run's output
  likelihood/              layer curves: likelihood.csv, .png, .svg, advice.md, logps/NAME/
  answers/                 NAME.jsonl and NAME.settings.json
  judge/A-vs-B/            verdicts.jsonl, settings.json, result.json
  h4/                      NAME.json, h4.md
  report.html
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, Problem

RESULT = "hf"
"""Where a finished run has its model."""

RUN_FILE = "config.yaml"
"""What tells a run's output from a model's directory."""

BASE, TRAINED = "base", "trained"
"""The names of a run's own models, where `evaluate.models` names none."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model that is evaluated."""

    name: str
    """What it is called in tables and pictures; also its files' name."""

    path: str
    """A Hugging Face directory or hub name, or a `torch_dist` checkpoint of ours."""

    adapter: Path | None = None
    """A PEFT directory."""


def subjects(config: RunConfig) -> tuple[Subject, ...]:
    """The models of `evaluate.models` in their order, or a run's model before and after.

    Reads the section `training` where it is there and nothing is named.

    Raises:
        ConfigError: naming every run without a result; or nothing is named and there is no run.
    """
    named = {
        name: (f"evaluate.models.{name}", subject.path, subject.adapter)
        for name, subject in config.evaluate.models.items()
    }
    if not named:
        if not config.has("training"):
            remedy = "name models there, or add training.output, the output of a finished run"
            raise ConfigError.at("evaluate.models", "names no model", remedy)
        named = {
            BASE: ("model.path", config.model.path, None),
            TRAINED: ("training.output", config.training.output, None),
        }
    found: list[Subject] = []
    problems: list[Problem] = []
    for name, (location, path, adapter) in named.items():
        try:
            model = _model(location, path)
        except ConfigError as error:
            problems += error.problems
            continue
        found.append(Subject(name, model, None if adapter is None else Path(adapter)))
    if problems:
        raise ConfigError.of(problems)
    return tuple(found)


def evaluation_directory(config: RunConfig) -> Path:
    """Where results go; nothing is made.

    Raises:
        ConfigError: no place is named.
    """
    if config.evaluate.output is not None:
        return Path(config.evaluate.output)
    if not config.has("training"):
        remedy = "name a directory, or add training.output, in which it is `evaluation`"
        raise ConfigError.at("evaluate.output", "says no place for the results", remedy)
    return Path(config.training.output).expanduser() / "evaluation"


def _model(location: str, path: str) -> str:
    """The model itself, where a run's output stands for its result.

    Raises:
        ConfigError: the run has none.
    """
    directory = Path(path).expanduser()
    is_run = (directory / RUN_FILE).is_file() and not (directory / "config.json").is_file()
    if (directory / RESULT).is_dir():
        return str(directory / RESULT)
    if is_run or location == "training.output":
        message = f"{path} has no {RESULT}/: no run has finished there"
        raise ConfigError.at(location, message, "let `train` finish, or name a model's directory")
    return path
