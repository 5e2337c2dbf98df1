"""The models that an evaluation compares, and the files of its results.

OUTPUT/                    `evaluate.output`; default: `evaluation` in the run's output directory
  likelihood/              layer curves: likelihood.csv, .png, .svg, advice.md, logps/NAME/
  answers/                 NAME.jsonl and NAME.settings.json
  judge/A-vs-B/            verdicts.jsonl, settings.json, result.json
  h4/                      NAME.json, h4.md
  report.html
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.storage.atomic import write_text
from megatron_idpo.storage.lock import LockHeldError, locked

RESULT = "hf"
"""Subdirectory of a finished run with the exported model."""

RUN_FILE = "config.yaml"
"""Marks the output directory of a run; a model directory has no such file."""

OUTPUT = "evaluate.output"
"""Location of errors about result files: the field that moves them."""

BASE, TRAINED = "base", "trained"
"""Names of a run's model before and after training, used if `evaluate.models` is empty."""


@dataclass(frozen=True, slots=True)
class EvalModel:
    """One model of an evaluation."""

    name: str
    """Label in tables and figures, and stem of its result files."""

    path: str
    """Hugging Face directory, hub name, or `torch_dist` checkpoint."""

    adapter: Path | None = None
    """Directory of a PEFT adapter."""


def eval_models(config: RunConfig) -> tuple[EvalModel, ...]:
    """Returns the models of `evaluate.models` in order; if empty, the run's model before and after.

    Raises:
        ConfigError: a run has no exported model; or no model is configured.
    """
    entries = {
        name: (f"evaluate.models.{name}", model.path, model.adapter)
        for name, model in config.evaluate.models.items()
    }
    if not entries:
        if not config.has("training"):
            remedy = "name models there, or set training.output to the output of a finished run"
            raise ConfigError.at("evaluate.models", "names no model", remedy)
        entries = {
            BASE: ("model.path", config.model.path, None),
            TRAINED: ("training.output", config.training.output, None),
        }
    return tuple(
        EvalModel(name, _exported_model(location, path), Path(adapter) if adapter else None)
        for name, (location, path, adapter) in entries.items()
    )


def evaluation_output(config: RunConfig) -> Path:
    """Returns the directory of all results; it is not created.

    Raises:
        ConfigError: none is configured.
    """
    if config.evaluate.output is not None:
        return Path(config.evaluate.output).expanduser()
    if not config.has("training"):
        remedy = "set it, or set training.output (results go to its subdirectory `evaluation`)"
        raise ConfigError.at(OUTPUT, "is not set", remedy)
    return Path(config.training.output).expanduser() / "evaluation"


def _exported_model(location: str, path: str) -> str:
    """Replaces the output directory of a run by the model that the run exported.

    Raises:
        ConfigError: the run has not exported one.
    """
    directory = Path(path).expanduser()
    is_run = (directory / RUN_FILE).is_file() and not (directory / "config.json").is_file()
    if (directory / RESULT).is_dir():
        return str(directory / RESULT)
    if is_run or location == "training.output" or _is_empty(directory):
        message = f"{path} has no {RESULT}/: the run has not finished"
        raise ConfigError.at(location, message, "finish it with `train`, or name a model directory")
    return path


def _is_empty(directory: Path) -> bool:
    """Whether it is a directory without files: that of a run which stopped at an error at once."""
    return directory.is_dir() and all(one.name.startswith(".") for one in directory.iterdir())


def write_result(path: Path, text: str) -> None:
    """Writes a result file in one step, and creates its directory.

    Raises:
        ConfigError: the system refuses; an old file is unchanged.
    """
    with ConfigError.on_os_error(OUTPUT, f"cannot write {path}", "name a writable directory"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, concurrent=True)


def check_writable(directory: Path) -> None:
    """Creates a directory for results, before hours of work instead of after them.

    Raises:
        ConfigError: it cannot be created or written.
    """
    remedy = "name a writable directory"
    with ConfigError.on_os_error(OUTPUT, f"cannot create {directory}", remedy):
        directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise ConfigError.at(OUTPUT, f"{directory} is not writable", remedy)


@contextmanager
def single_writer(path: Path) -> Iterator[None]:
    """Holds the lock of a result file that grows, and creates its directory.

    Raises:
        ConfigError: another process holds the lock, or it cannot be created.
    """
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        try:
            with ConfigError.on_os_error(OUTPUT, f"cannot lock {lock}", "name another directory"):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(lock))
        except LockHeldError:
            message = f"{path} is being written by another process"
            remedy = "wait until it has finished, or name another directory"
            raise ConfigError.at(OUTPUT, message, remedy) from None
        yield
