"""Where a training run stands, beside its tensors: the numbers and names of a checkpoint.

`progress.json` lies beside the tensors' files. No random state is in it: a training step seeds its
generators from the run's seed, the step's number and the rank's place, so that going on in another
layout, or after a crash, draws what the unbroken run would have drawn.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from megatron_idpo import __version__
from megatron_idpo.errors import CheckpointError, Problem
from megatron_idpo.storage.provenance import as_problems, diff

FILE = "progress.json"
"""The file's name in a checkpoint."""

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after a step. Everything in it can be written as JSON."""

    step: int
    """Optimizer steps of the run so far; names the checkpoint."""

    data: dict[str, Any]
    """The position in the data: `TrainingBatches.state_dict()`."""

    data_fingerprint: str
    """Of the tokenised pairs."""

    base_model: str
    """The fingerprint of the model that training began with."""

    config: dict[str, Any]
    """The run's resolved configuration."""

    reference: str = ""
    """The identity of what the policy is compared to; empty where nothing is known of it."""

    metrics: dict[str, float] = field(default_factory=dict)
    """The last ones logged, for people to read."""

    layout: dict[str, Any] = field(default_factory=dict)
    """Parallel sizes at the time of writing, for people to read."""

    version: str = __version__
    """Of this package, at the time of writing."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of `progress.json`."""

    progress: Progress

    score: float | None
    """What the checkpoint is ranked by, where it was measured."""

    metric: str | None = None
    """What `score` measures, by its name in the metrics; None where nobody said."""

    optimizer_steps: int
    """Steps that the optimizer has taken, which Adam's bias correction depends on."""

    loss_scale: dict[str, float] | None = None
    """fp16's loss scaler."""

    def write(self, directory: Path) -> None:
        """Write the file; the caller makes sure that it reaches the disk.

        Raises:
            CheckpointError: it cannot be written.
        """
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        path = directory / FILE
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError.at(str(path), f"cannot be written: {error.strerror}") from error

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The file of a checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or of another version of this package.
        """
        path = directory / FILE
        remedy = f"delete {directory} to go on from the checkpoint before it"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            written = content.pop("format")
            if written != _FORMAT:
                version = content["progress"]["version"]
                message = (
                    f"is in format {written}, of megatron-idpo {version}; this is {__version__}"
                )
                raise CheckpointError.at(str(path), message, "go on with that version")
            known = {one.name for one in fields(Progress)}
            kept = {k: v for k, v in content.pop("progress").items() if k in known}
            progress = Progress(**kept)
            if "metric" not in content:  # older records: the run's configuration has it
                content["metric"] = progress.config.get("checkpoint", {}).get("best_metric")
            return cls(progress=progress, **content)
        except OSError as error:
            raise CheckpointError.at(
                str(path), f"cannot be read: {error.strerror}", remedy
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            message = f"is damaged ({type(error).__name__}: {error})"
            raise CheckpointError.at(str(path), message, remedy) from error


def check_same_run(saved: Progress, current: Progress, location: str) -> list[Problem]:
    """Why a run must not go on from a checkpoint; empty where it may.

    Layout, learning rate and most else may change. The data and the model that training began with
    may not: pairs would be met twice or never, adapters would sit on other weights.

    Args:
        saved: what the checkpoint says.
        current: what this run would say at its start.
        place: the checkpoint's directory, to be named.
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
