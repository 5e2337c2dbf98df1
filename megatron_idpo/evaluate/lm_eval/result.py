"""What is known of one model: `h4/NAME.json`, which grows by a task at a time.

    {"model", "tasks": {task: {"metric", "value", "stderr", "items", "few_shot", "examples", "cut",
    "files"}}, "mean", "mean_stderr", "source", "lm_eval", "limit", "settings"}

Values are shares of 1. `settings` has what the figures depend on, beside each task's own files; a
result with other settings is refused, never mixed with new figures or replaced.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.lm_eval.backend import Measured
from megatron_idpo.evaluate.result_files import write_text

HUB = "hub"
_TOLD = {
    "weights": "the model's files",
    "adapter": "the adapter's files",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "limit": "h4.limit",
    "source": "h4.items",
    "lm_eval": "lm-eval's version",
}
_DIGITS = 64
"""Of a hash, which says nothing to a reader."""


@dataclass
class H4Result:
    """One model's figures."""

    model: str
    settings: dict[str, Any]
    """What they depend on, by the names of `_TOLD`."""

    source: str
    """`hub` or the directory of the items, as it was written."""

    tasks: dict[str, Measured] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Task -> sha256 of its local files by name."""

    @property
    def mean(self) -> float | None:
        """H4; None unless all four are there."""
        if set(self.tasks) != set(H4_TASKS):
            return None
        return sum(task.value for task in self.tasks.values()) / len(H4_TASKS)

    @property
    def mean_stderr(self) -> float | None:
        """Of the mean: the tasks' items have nothing to do with each other."""
        errors = [task.stderr for task in self.tasks.values() if task.stderr is not None]
        if self.mean is None or len(errors) < len(H4_TASKS):
            return None
        return float(sum(error**2 for error in errors) ** 0.5 / len(H4_TASKS))

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            ConfigError: it cannot be written.
        """
        tasks = {
            name: {**asdict(self.tasks[name]), "files": self.files.get(name, {})}
            for name in H4_TASKS
            if name in self.tasks
        }
        message = {
            "model": self.model,
            "tasks": tasks,
            "mean": self.mean,
            "mean_stderr": self.mean_stderr,
            "source": self.source,
            "lm_eval": self.settings["lm_eval"],
            "limit": self.settings["limit"],
            "settings": self.settings,
        }
        write_text(path, json.dumps(message, indent=1) + "\n")


def read_result(path: Path) -> H4Result | None:
    """What is there; None if nothing is.

    Raises:
        ConfigError: the file is something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        tasks = {name: dict(message) for name, message in values["tasks"].items()}
        files = {name: message.pop("files") for name, message in tasks.items()}
        if set(values["settings"]) != set(_TOLD):
            raise ValueError(f"settings {sorted(set(values['settings']) ^ set(_TOLD))}")
        return H4Result(
            values["model"],
            dict(values["settings"]),
            values["source"],
            {name: Measured(**message) for name, message in tasks.items()},
            files,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"is no result of h4: {type(error).__name__}: {error}"
        raise ConfigError.at(str(path), message, "remove it") from None


def check_same(
    path: Path, found: H4Result, wanted: H4Result, files: Mapping[str, Mapping[str, str]]
) -> None:
    """What is there was measured as it is wanted now.

    Args:
        path: of the file.
        found: what it has.
        wanted: with the settings of now.
        files: sha256 of the items' files that would be read now, by task.

    Raises:
        ConfigError: naming everything that differs.
    """
    message = [_describe(name, found.settings[name], wanted.settings[name]) for name in _TOLD]
    message += [
        f"the items of {task} differ"
        for task in found.tasks
        if task in files and dict(files[task]) != found.files.get(task)
    ]
    differences = [difference for difference in message if difference]
    if differences:
        told_all = f"was measured otherwise: {'; '.join(differences)}"
        remedy = "remove the file to measure again, or name another evaluate.output"
        raise ConfigError.at(str(path), told_all, remedy)


def _describe(name: str, before: Any, now: Any) -> str | None:
    if before == now:
        return None
    if any(isinstance(value, str) and len(value) == _DIGITS for value in (before, now)):
        return f"{_TOLD[name]} differ"
    return f"{_TOLD[name]} was {_value(before)}, here {_value(now)}"


def _value(value: Any) -> str:
    return "null" if value is None else str(value)
