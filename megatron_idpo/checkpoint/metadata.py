"""`progress.json`: the position of a training run, stored in a checkpoint next to the tensors.

There is no random state in it: a training step seeds its generators from the run's seed, the step
number and the rank's coordinates, so a run that resumes, in any layout, draws the same numbers as
one that was not interrupted.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from megatron_idpo import __version__
from megatron_idpo.errors import CheckpointError, Problem
from megatron_idpo.storage.provenance import as_problems, diff, read_record

FILE = "progress.json"

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The position of a run after a step. All values can be written as JSON."""

    step: int
    """Number of optimizer steps; names the checkpoint."""

    data: dict[str, Any]
    """The position in the data: `TrainingBatches.state_dict()`."""

    data_fingerprint: str
    """Of the tokenized pairs."""

    base_model: str
    """Fingerprint of the model that training started from."""

    config: dict[str, Any]
    """The run's resolved configuration."""

    reference: str = ""
    """Identity of the reference model; empty if unknown."""

    metrics: dict[str, float] = field(default_factory=dict)
    """The last logged ones, for people to read."""

    layout: dict[str, Any] = field(default_factory=dict)
    """Parallel sizes at the time of writing, for people to read."""

    version: str = __version__
    """Of this package, at the time of writing."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of `progress.json`."""

    progress: Progress

    score: float | None
    """Value of the metric that the checkpoint is ranked by; None if it was not measured."""

    metric: str | None = None
    """Name of that metric; None if unknown."""

    optimizer_steps: int
    """Number of steps of the optimizer, which determines Adam's bias correction."""

    loss_scale: dict[str, float] | None = None
    """State of fp16's loss scaler."""

    def write(self, directory: Path) -> None:
        """Writes the file without flushing it: `atomic.publish_directory` does that.

        Raises:
            CheckpointError: it cannot be written.
        """
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        path = directory / FILE
        with CheckpointError.on_os_error(str(path), "cannot be written"):
            path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads the file of a checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or of another version of this package.
        """
        path = directory / FILE
        remedy = f"delete {directory} to resume from the checkpoint before it"
        content = read_record(path, error=CheckpointError, remedy=remedy)
        try:
            written_format = content.pop("format")
            if written_format != _FORMAT:
                version = content["progress"]["version"]
                message = f"has format {written_format} of megatron-idpo {version}"
                remedy = f"this is megatron-idpo {__version__}; resume with version {version}"
                raise CheckpointError.at(str(path), message, remedy)
            # Files of older versions have fields that no longer exist.
            known = {field.name for field in fields(Progress)}
            saved = content.pop("progress")
            progress = Progress(**{name: saved[name] for name in saved if name in known})
            if "metric" not in content:  # older files: the run's configuration has it
                content["metric"] = progress.config.get("checkpoint", {}).get("best_metric")
            return cls(progress=progress, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"is damaged ({type(error).__name__}: {error})"
            raise CheckpointError.at(str(path), message, remedy) from error


def check_same_run(saved: Progress, current: Progress, location: str) -> list[Problem]:
    """Checks that a run may resume from a checkpoint; returns the problems.

    Layout, learning rate and most other settings may change. The data and the base model may not:
    pairs would be seen twice or never, and adapters would be added to other weights.

    Args:
        saved: of the checkpoint.
        current: of this run at its start.
        location: the checkpoint directory, for messages.
    """
    labels = {
        "base_model": "the base model (section `model`)",
        "data_fingerprint": "the data (section `data`)",
    }
    if saved.reference and current.reference:  # empty: unknown
        labels["reference"] = "the reference"
    saved_parts, current_parts = (
        {name: getattr(progress, name) for name in labels} for progress in (saved, current)
    )
    return as_problems(
        diff(saved_parts, current_parts, labels),
        location,
        "resume with the settings that the run was started with, or name another output directory",
    )
