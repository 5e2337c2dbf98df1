"""What there is to show of the runs that were named, and what each is called on the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idpo.config.yaml_tree import read_tree
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.evaluate.models import RESULT, RUN_FILE
from megatron_idpo.evaluate.report.evaluation_inputs import (
    ANSWERS,
    H4,
    JUDGE,
    LIKELIHOOD,
    Evaluation,
    read_evaluation,
)
from megatron_idpo.evaluate.report.input_files import read_object
from megatron_idpo.sdpo.manifest import Manifest, read_manifest
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.names import ACCURACY, EVAL_PAIRS, layers_in

METRICS = "metrics.jsonl"
_REMEDY = "name a run's training.output, or the directory of an evaluation"


@dataclass(frozen=True, slots=True)
class Found:
    """A run, or an evaluation by itself."""

    root: Path
    label: str
    """What it is called: as much of its path's end as tells it from the others."""

    config: Mapping[str, Any]
    """The resolved configuration, as it was written; empty where there is none."""

    records: Sequence[Record]
    """What was logged in training."""

    layers: Sequence[int]
    """The intermediate layers that something was logged of."""

    manifest: Manifest | None
    """Of a run of several steps."""

    model: Mapping[str, Any]
    """`config.json` of the result, where it is there."""

    evaluation: Evaluation

    @property
    def is_run(self) -> bool:
        """Whether it was trained, and not evaluated alone."""
        return bool(self.records or self.config or self.manifest)


def find(roots: Sequence[Path]) -> list[Found]:
    """What is in each directory.

    Raises:
        UserError: naming every directory that cannot be shown; or a file is damaged.
    """
    paths = [root.expanduser() for root in roots]
    problems = [problem for path in paths if (problem := _unusable(path))]
    resolved = [path.resolve() for path in paths]
    problems += [
        Problem(str(path), "is named twice", "name it once")
        for location, path in enumerate(paths)
        if resolved.index(path.resolve()) < location
    ]
    if problems:
        raise ConfigError.of(problems)
    labels = _labels(resolved)
    found = [_found(path, label) for path, label in zip(paths, labels, strict=True)]
    empty = [one for one in found if not (one.records or one.manifest or one.evaluation)]
    if empty:
        raise ConfigError.of([Problem(str(one.root), _nothing(one), _REMEDY) for one in empty])
    return found


def _unusable(path: Path) -> Problem | None:
    if path.is_dir():
        return None
    message = "is a file, not a directory" if path.exists() else "does not exist"
    return Problem(str(path), message, _REMEDY)


def _nothing(found: Found) -> str:
    if found.config:
        return "has a configuration, but no step has been logged and nothing evaluated yet"
    kinds = ", ".join(f"{kind}/" for kind in (LIKELIHOOD, ANSWERS, JUDGE, H4))
    return f"has nothing to show: no {METRICS}, and none of {kinds}"


def _found(root: Path, label: str) -> Found:
    config = root / RUN_FILE
    values = read_tree(config).values if config.is_file() else {}
    metrics, model = root / METRICS, root / RESULT / "config.json"
    records = _records(metrics) if metrics.is_file() else []
    return Found(
        root=root,
        label=label,
        config=values,
        records=records,
        layers=layers_in({name for record in records for name in record}),
        manifest=read_manifest(root),
        model=read_object(model, "copy the model back, or train again") if model.is_file() else {},
        evaluation=_evaluation(root, values),
    )


def _evaluation(root: Path, config: Mapping[str, Any]) -> Evaluation:
    """Of the directory itself, or of the one where the run's evaluation goes."""
    section = config.get("evaluate")
    named = section.get("output") if isinstance(section, dict) else None
    locations = [root, root / "evaluation"]
    if isinstance(named, str):
        locations.insert(1, Path(named).expanduser())
    return next(
        (found for location in locations if (found := read_evaluation(location))), Evaluation()
    )


def _records(path: Path) -> list[Record]:
    """What was logged.

    Raises:
        ConfigError: it cannot be read, has no line of ours, or a share that is none.
    """
    records = read_metrics(path)
    if not records and path.stat().st_size:
        message = "has no line with a step: it is damaged, or of another program"
        raise ConfigError.at(str(path), message, "copy it back from where it is whole")
    for record in records:
        for name, value in record.items():
            if name.endswith(ACCURACY) and (value < 0 or value > 1):
                message = f"has {name} = {value:g} at step {record[STEP]:.0f}, which is no share"
                raise ConfigError.at(str(path), message, "copy it back from where it is whole")
    return [{k: v for k, v in one.items() if k != EVAL_PAIRS or v > 0} for one in records]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ; `evaluation` alone says nothing."""
    least = [2 if path.name == "evaluation" else 1 for path in paths]
    for _ in range(max(len(path.parts) for path in paths)):
        names = [
            "/".join(path.parts[-count:]).lstrip("/")
            for path, count in zip(paths, least, strict=True)
        ]
        least = [count + (names.count(name) > 1) for name, count in zip(names, least, strict=True)]
        if len(set(names)) == len(names):
            break
    return names
