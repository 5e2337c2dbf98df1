"""What the layer curves in a directory were made of, so that nobody takes them for others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.models import Subject
from megatron_idpo.evaluate.result_files import write_text

FILE = "settings.json"


def write_made_of(
    directory: Path, config: RunConfig, models: Sequence[Subject], readings: Mapping[str, str]
) -> None:
    """Write it down.

    Args:
        directory: of the curves.
        config: that they are of.
        models: that they are of.
        readings: where in the directory the log-probabilities of the reference and of each model
            are (`reference.parquet`, docs/reference.md).

    Raises:
        ConfigError: it cannot be written.
    """
    message = {
        "reference": config.model.path,
        "models": {
            subject.name: subject.path
            if subject.adapter is None
            else f"{subject.path} with {subject.adapter}"
            for subject in models
        },
        "beta": config.objective.beta,
        "norm": config.objective.norm,
        "dtype": config.model.dtype,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
        "seed": config.evaluate.seed,
        "readings": dict(readings),
    }
    write_text(directory / FILE, json.dumps(message, indent=2, ensure_ascii=False) + "\n")


def read_made_of(directory: Path) -> dict[str, Any]:
    """What `write_made_of` wrote.

    Raises:
        DataError: it is not there, or damaged.
    """
    path = directory / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        models, reference, beta = found["models"], found["reference"], found["beta"]
        assert isinstance(models, dict) and isinstance(reference, str) and isinstance(beta, float)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        message = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError.at(str(path), message, "make it by `likelihood`") from None
    return found
