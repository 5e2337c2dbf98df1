"""What the report shows: runs and evaluations, read from their directories."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_idpo.config.yaml_tree import read_tree
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.generate.answers import Answer, answers_file, settings_file
from megatron_idpo.evaluate.likelihood.curves_file import FILE, read_curves
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.lm_eval.result import H4Result, read_result
from megatron_idpo.evaluate.models import RESULT, RUN_FILE
from megatron_idpo.sdpo.manifest import Manifest, read_manifest
from megatron_idpo.storage.provenance import file_digest, read_record
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.names import ACCURACY, EVAL_PAIRS, layers_in

METRICS = "metrics.jsonl"
_KINDS = ("likelihood", "answers", "judge", "h4")
_REMEDY = "name the training.output of a run, or the directory of an evaluation"
_RESTORE = "restore it, or make it again"


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """A model's answers by the locations of their prompts (`pairs.jsonl:17`), in order."""

    answers: Mapping[str, Answer]
    settings: Mapping[str, Any]
    """How they were generated; empty if not known."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models' answers compared by a judge; numbers as in `result.json`, NaN for null."""

    a: str
    b: str
    judge: str
    summary: str
    wins: float
    losses: float
    ties: float
    unjudged: float
    win_rate: float
    low: float
    high: float
    p_value: float
    verdicts: Mapping[int, str]
    """Prompt -> the winner, `a` or `b`; `tie`; or `disagreed`, a tie because the verdict flipped
    when the answers were swapped. Empty if the judge saw other answers than those in `answers/`."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything in an evaluation's directory; empty where there is nothing."""

    curves: Sequence[LayerCurves] = ()
    advice: str = ""
    answers: Mapping[str, AnswerSet] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()
    h4: Mapping[str, H4Result] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.curves or self.answers or self.comparisons or self.h4)

    @property
    def models(self) -> list[str]:
        """All models."""
        compared = [name for judged in self.comparisons for name in (judged.a, judged.b)]
        curves = [curves.model for curves in self.curves]
        return list(dict.fromkeys([*curves, *self.answers, *compared, *self.h4]))


@dataclass(frozen=True, slots=True)
class RunInputs:
    """A run with its evaluation, or an evaluation alone."""

    root: Path
    label: str
    """The end of the path that differs from the other runs'."""

    config: Mapping[str, Any]
    """The resolved configuration as it was written; empty for an evaluation alone."""

    records: Sequence[Record]
    """Logged metrics."""

    layers: Sequence[int]
    """Intermediate layers with metrics."""

    manifest: Manifest | None
    """Of an sDPO run."""

    model: Mapping[str, Any]
    """`config.json` of the exported model; empty if there is none."""

    evaluation: Evaluation

    @property
    def is_run(self) -> bool:
        """Whether it is more than an evaluation."""
        return bool(self.records or self.config or self.manifest)


def read_runs(roots: Sequence[Path]) -> list[RunInputs]:
    """Read all directories.

    Raises:
        UserError: lists every directory that has nothing to show; or a file is damaged.
    """
    paths = [root.expanduser() for root in roots]
    resolved = [path.resolve() for path in paths]
    problems = []
    for at, path in enumerate(paths):
        if not path.is_dir():
            message = "is a file, not a directory" if path.exists() else "does not exist"
            problems.append(Problem(str(path), message, _REMEDY))
        elif resolved[at] in resolved[:at]:
            problems.append(Problem(str(path), "is named twice", "name it once"))
    if problems:
        raise ConfigError.of(problems)
    runs = [_read_run(*labeled) for labeled in zip(paths, _labels(resolved), strict=True)]
    for run in runs:
        if not (run.records or run.manifest or run.evaluation):
            message = f"has nothing to show: no {METRICS}, and none of {'/, '.join(_KINDS)}/"
            if run.config:
                message = "has a configuration, but no step was logged and nothing evaluated yet"
            problems.append(Problem(str(run.root), message, _REMEDY))
    if problems:
        raise ConfigError.of(problems)
    return runs


def merge_models[T](
    runs: Sequence[RunInputs],
    values: Callable[[RunInputs], Mapping[str, T]],
    is_same: Callable[[T, T], bool],
) -> dict[str, T]:
    """All models' values by label.

    A model with the same value in several runs (their common base) has one entry, labeled by its
    name; any other model of several runs is labeled `run · model`.
    """
    merged: dict[str, T] = {}
    for run in runs:
        for model, value in values(run).items():
            others = [values(other).get(model) for other in runs if other is not run]
            is_shared = any(other is not None and is_same(value, other) for other in others)
            label = model if is_shared or len(runs) == 1 else f"{run.label} · {model}"
            if label in merged and not is_same(merged[label], value):
                label = f"{run.label} · {model}"
            merged.setdefault(label, value)
    return merged


def _read_run(root: Path, label: str) -> RunInputs:
    config_file, metrics = root / RUN_FILE, root / METRICS
    model_file = root / RESULT / "config.json"
    config = read_tree(config_file).values if config_file.is_file() else {}
    records = _read_records(metrics) if metrics.is_file() else []
    has_model = model_file.is_file()
    return RunInputs(
        root=root,
        label=label,
        config=config,
        records=records,
        layers=layers_in({name for record in records for name in record}),
        manifest=read_manifest(root),
        model=read_record(model_file, error=DataError, remedy=_RESTORE) if has_model else {},
        evaluation=_find_evaluation(root, config),
    )


def _find_evaluation(root: Path, config: Mapping[str, Any]) -> Evaluation:
    """In the directory itself, or where the run's configuration puts it."""
    section = config.get("evaluate")
    output = section.get("output") if isinstance(section, dict) else None
    directories = [root, root / "evaluation"]
    if isinstance(output, str):
        directories.insert(1, Path(output).expanduser())
    return next(filter(None, map(read_evaluation, directories)), Evaluation())


def _read_records(path: Path) -> list[Record]:
    """Logged metrics.

    Raises:
        ConfigError: the file cannot be read, has no step, or an accuracy above 1.
    """
    records = read_metrics(path)
    if not records and path.stat().st_size:
        message = "has no line with a step: it is damaged, or not a metrics file"
        raise ConfigError.at(str(path), message, _RESTORE)
    for record in records:
        for name, value in record.items():
            if name.endswith(ACCURACY) and (value < 0 or value > 1):
                message = f"has {name} = {value:g} at step {record[STEP]:.0f}, not within 0 and 1"
                raise ConfigError.at(str(path), message, _RESTORE)
    return [{k: v for k, v in record.items() if k != EVAL_PAIRS or v > 0} for record in records]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ; `evaluation` with its parent."""
    lengths = [2 if path.name == "evaluation" else 1 for path in paths]
    while True:
        labels = [
            "/".join(path.parts[-length:]).lstrip("/")
            for path, length in zip(paths, lengths, strict=True)
        ]
        if len(set(labels)) == len(labels) or max(lengths) > max(len(p.parts) for p in paths):
            return labels
        lengths = [n + (labels.count(label) > 1) for n, label in zip(lengths, labels, strict=True)]


# ---- evaluations ------------------------------------------------------------------------------


def read_evaluation(root: Path) -> Evaluation:
    """Everything in an evaluation's directory, which need not exist.

    Raises:
        UserError: a file is damaged.
    """
    curves, advice = root / "likelihood" / FILE, root / "likelihood" / "advice.md"
    return Evaluation(
        curves=read_curves(curves) if curves.exists() else (),
        advice=_read_text(advice) if advice.exists() else "",
        answers={
            path.stem: _read_answers(path)
            for path in sorted((root / "answers").glob("[!.]*.jsonl"))
        },
        comparisons=[
            _read_comparison(path) for path in sorted((root / "judge").glob("[!.]*/result.json"))
        ],
        h4={path.stem: read_result(path) for path in sorted((root / "h4").glob("[!.]*.json"))},
    )


def _read_text(path: Path) -> str:
    try:
        with DataError.on_os_error(str(path), "cannot be read", _RESTORE):
            return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError.at(str(path), f"is not UTF-8: {error}", _RESTORE) from None


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Location and JSON object of each line; an incomplete last line is still being written."""
    lines = []
    for number, line in enumerate(_read_text(path).split("\n")[:-1], start=1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError.at(location, f"is not JSON: {error}", _RESTORE) from None
        if not isinstance(values, dict):
            raise DataError.at(location, "is not a JSON object", _RESTORE)
        lines.append((location, values))
    return lines


def _read_answers(path: Path) -> AnswerSet:
    """The answers so far."""
    names = [field.name for field in fields(Answer)]
    answers = {}
    for location, values in _read_lines(path):
        prompt = values.get("prompt")
        is_chat = isinstance(prompt, list) and all(isinstance(part, dict) for part in prompt)
        if not isinstance(values.get("answer"), str) or not (is_chat or isinstance(prompt, str)):
            raise DataError.at(location, "has no text `answer` or no `prompt`", _RESTORE)
        if missing := [name for name in names if name not in values]:
            raise DataError.at(location, f"has no field {', '.join(missing)}", _RESTORE)
        answers[str(values["location"])] = Answer(**{name: values[name] for name in names})
    settings = settings_file(path)
    has_settings = settings.exists()
    return AnswerSet(
        answers, read_record(settings, error=DataError, remedy=_RESTORE) if has_settings else {}
    )


def _read_comparison(path: Path) -> Comparison:
    values = read_record(path, error=DataError, remedy=_RESTORE)
    parts: dict[str, Any] = {}
    for part in fields(Comparison):
        value = values.get(part.name)
        if part.type is str:
            if not isinstance(value, str):
                raise DataError.at(str(path), f"has {part.name} = {value!r}, not text", _RESTORE)
            parts[part.name] = value
        elif part.type is float:
            parts[part.name] = float(value) if isinstance(value, int | float) else math.nan
    verdicts: Mapping[int, str] = {}
    if _is_outdated(path.parent, parts["a"], parts["b"]):
        parts["summary"] += "; the answers have changed since"
    elif (file := path.with_name("verdicts.jsonl")).exists():
        verdicts = _read_verdicts(file)
    return Comparison(**parts, verdicts=verdicts)


def _is_outdated(directory: Path, a: str, b: str) -> bool:
    """Whether the judge saw other answers than those that are there, as far as known."""
    settings = directory / "settings.json"
    if not settings.exists():
        return False
    digests = read_record(settings, error=DataError, remedy=_RESTORE).get("answers")
    files = {side: answers_file(directory.parents[1], name) for side, name in (("a", a), ("b", b))}
    return isinstance(digests, dict) and any(
        file.is_file() and file_digest(file) != digests.get(side) for side, file in files.items()
    )


def _read_verdicts(path: Path) -> dict[int, str]:
    """The outcome of each prompt with verdicts in all orders."""
    winners: dict[int, dict[str, str]] = {}
    for location, values in _read_lines(path):
        index, order, winner = (values.get(name) for name in ("index", "order", "verdict"))
        if winner is None:
            continue
        is_valid = winner in ("a", "b", "tie") and order in ("ab", "ba", "both")
        if not is_valid or not isinstance(index, int):
            raise DataError.at(location, f"is not a verdict: {winner!r}, {order!r}", _RESTORE)
        winners.setdefault(index, {})[str(order)] = winner
    return {
        index: by_order.popitem()[1] if len(set(by_order.values())) == 1 else "disagreed"
        for index, by_order in winners.items()
        if "both" in by_order or len(by_order) == 2
    }
