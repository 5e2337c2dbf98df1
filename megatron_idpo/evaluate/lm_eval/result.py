"""One model's values: `h4/NAME.json`, rewritten after each task.

    {"model", "tasks": {task: {"metric", "value", "stderr", "items", "few_shot", "examples", "cut",
    "files"}}, "mean", "mean_stderr", "source", "lm_eval", "limit", "settings"}

Values are shares of 1. `settings` has what the values depend on apart from each task's files. A
result with other settings is refused: it is neither mixed with new values nor replaced.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.evaluate.generate.answers import first_error
from megatron_idpo.evaluate.lm_eval.tasks import TaskResult
from megatron_idpo.storage.provenance import as_problems, diff, read_record, write_record

HUB = "hub"
_LABELS = {
    "weights": "the model's files",
    "adapter": "the adapter's files",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "limit": "h4.limit",
    "source": "h4.items",
    "lm_eval": "lm-eval's version",
}
_OTHER_SETTINGS = "remove the file to measure again, or name another evaluate.output"


@dataclass
class H4Result:
    """One model's values."""

    model: str
    settings: dict[str, Any]
    """What they depend on, by the names of `_LABELS`."""

    source: str
    """`hub`, or the directory of the items as configured."""

    tasks: dict[str, TaskResult] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """H4; None unless all four tasks are done."""
        if set(self.tasks) != set(H4_TASKS):
            return None
        return sum(task.value for task in self.tasks.values()) / len(H4_TASKS)

    @property
    def mean_stderr(self) -> float | None:
        """Standard error of the mean; the tasks are independent."""
        errors = [task.stderr for task in self.tasks.values() if task.stderr is not None]
        if self.mean is None or len(errors) < len(H4_TASKS):
            return None
        return math.sqrt(sum(error**2 for error in errors)) / len(H4_TASKS)

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            ConfigError: it cannot be written.
        """
        values = {
            "model": self.model,
            "tasks": {name: asdict(self.tasks[name]) for name in H4_TASKS if name in self.tasks},
            "mean": self.mean,
            "mean_stderr": self.mean_stderr,
            "source": self.source,
            "lm_eval": self.settings["lm_eval"],
            "limit": self.settings["limit"],
            "settings": self.settings,
        }
        write_record(path, values, error=ConfigError)


def read_result(path: Path) -> H4Result:
    """Read the file of `H4Result.write`.

    Raises:
        ConfigError: it is missing, damaged, or something else.
    """
    remedy = "remove it and run `h4` again"
    values = read_record(path, error=ConfigError, remedy=remedy)
    try:
        result = TypeAdapter(H4Result).validate_python(values)
    except ValidationError as error:
        message = f"is not a result of h4: {first_error(error)}"
        raise ConfigError.at(str(path), message, remedy) from None
    if missing := ", ".join(_LABELS.keys() - result.settings.keys()):
        raise ConfigError.at(str(path), f"has no settings {missing}", remedy)
    return result


def check_same_settings(
    path: Path, stored: H4Result, settings: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """The stored values were measured with these settings and files.

    Args:
        path: of the stored result.
        stored: its content.
        settings: the current ones.
        files: task -> sha256 of its current local files by name.

    Raises:
        ConfigError: lists everything that differs.
    """
    problems = as_problems(diff(stored.settings, settings, _LABELS), str(path), _OTHER_SETTINGS)
    problems += [
        Problem(str(path), f"the items of {name} differ", _OTHER_SETTINGS)
        for name, task in stored.tasks.items()
        if files.get(name, task.files) != task.files
    ]
    if problems:
        raise ConfigError.of(problems)
