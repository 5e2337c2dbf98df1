"""What the report shows: runs and evaluations, read from their directories."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from megatron_idpo.config.yaml_tree import read_tree
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.generate.answers import Answer, answers_file, first_error, settings_file
from megatron_idpo.evaluate.judge.verdicts import Verdict
from megatron_idpo.evaluate.likelihood.curves_file import FILE, read_curves
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.lm_eval.result import H4Result, read_result
from megatron_idpo.evaluate.models import RESULT, RUN_FILE
from megatron_idpo.sdpo.manifest import FIRST, Manifest, read_manifest
from megatron_idpo.storage.provenance import file_digest, read_record
from megatron_idpo.train.metrics.file import STEP, Record, read_metrics
from megatron_idpo.train.metrics.names import ACCURACY, EVAL_PAIRS, layers_in
from megatron_idpo.train.starts import Start, read_starts

METRICS = "metrics.jsonl"
_REMEDY = "name the training.output of a run, or the directory of an evaluation"
_RESTORE = "restore it, or make it again"

type PromptKey = tuple[str, str]
"""Location and text of a prompt: two runs may have had different files of the same name."""


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """A model's answers in order. Equal if the answers are."""

    answers: Mapping[PromptKey, Answer]
    settings: Mapping[str, Any] = field(compare=False)
    """How they were generated; empty if not known."""


type _Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""NaN for null."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models' answers compared by a judge: the fields of `result.json`."""

    a: str
    b: str
    judge: str
    summary: str
    wins: int
    losses: int
    ties: int
    unjudged: int
    win_rate: _Number
    low: _Number
    high: _Number
    p_value: _Number
    verdicts: Mapping[int, str] = field(default_factory=dict)
    """Prompt -> the winner, `a` or `b`; `tie`; or `disagreed`, a tie because the verdict flipped
    when the answers were swapped. Empty if the judge saw other answers than those in `answers/`."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything in an evaluation's directory, by model; empty where there is nothing."""

    curves: Mapping[str, LayerCurves] = field(default_factory=dict)
    advice: str = ""
    answers: Mapping[str, AnswerSet] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()
    h4: Mapping[str, H4Result] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All models."""
        compared = [name for judged in self.comparisons for name in (judged.a, judged.b)]
        return list(dict.fromkeys([*self.curves, *self.answers, *compared, *self.h4]))


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

    starts: Sequence[Start]
    """By time; empty for an evaluation alone."""

    model: Mapping[str, Any]
    """`config.json` of the exported model; empty if there is none."""

    evaluation: Evaluation

    @property
    def held_out(self) -> str | None:
        """Fingerprint of the held-out pairs; None without any, or if it was not recorded."""
        return self.starts[-1].held_out if self.starts else None

    @property
    def against_first(self) -> dict[str, float]:
        """Held-out metrics of an sDPO result against the first model; empty if there are none.

        The last complete step's. Its logged metrics are against the step before, and compare with
        those of no other run.
        """
        for step in reversed(self.manifest.steps if self.manifest else ()):
            if any(name.startswith(FIRST) for name in step.metrics):
                named = step.metrics.items()
                return {k.removeprefix(FIRST): v for k, v in named if k.startswith(FIRST)}
        return {}


def read_runs(roots: Sequence[Path]) -> list[RunInputs]:
    """Read all directories.

    Raises:
        UserError: lists every directory that has nothing to show; or a file is damaged.
    """
    paths = [root.expanduser() for root in roots]
    problems = [
        Problem(str(path), "is not a directory", _REMEDY) for path in paths if not path.is_dir()
    ]
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(paths):
        problems.append(Problem(", ".join(map(str, paths)), "names a directory twice"))
    if problems:
        raise ConfigError.of(problems)
    runs = [_read_run(*labeled) for labeled in zip(paths, _labels(resolved), strict=True)]
    message = f"has nothing to show: no steps in {METRICS}, and no evaluation"
    for run in runs:
        if not (run.records or run.manifest or run.evaluation.models):
            problems.append(Problem(str(run.root), message, _REMEDY))
    if problems:
        raise ConfigError.of(problems)
    return runs


def merge_models[T](
    runs: Sequence[RunInputs], values: Callable[[Evaluation], Mapping[str, T]]
) -> dict[str, T]:
    """All models' values by label.

    A model with the same value in several runs (their common base) has one entry, labeled by its
    name; any other model of several runs is labeled `run · model`.
    """
    merged: dict[str, T] = {}
    for run in runs:
        for model, value in values(run.evaluation).items():
            others = [values(other.evaluation).get(model) for other in runs if other is not run]
            label = model if len(runs) == 1 or value in others else f"{run.label} · {model}"
            if merged.setdefault(label, value) != value:  # another model that runs share
                merged[f"{run.label} · {model}"] = value
    return merged


def comparisons(runs: Sequence[RunInputs]) -> list[tuple[RunInputs, str, Comparison]]:
    """All comparisons, each with a prefix that names its run if there are several runs.

    One that several runs share (those of one evaluation) occurs once, without a prefix.
    """
    every = [(run, one) for run in runs for one in run.evaluation.comparisons]
    found: list[tuple[RunInputs, str, Comparison]] = []
    for run, comparison in every:
        if any(comparison == other for _, _, other in found):
            continue
        is_shared = [other for _, other in every].count(comparison) > 1
        prefix = "" if is_shared or len(runs) == 1 else f"{run.label}: "
        found.append((run, prefix, comparison))
    return found


def _read_run(root: Path, label: str) -> RunInputs:
    config_file, metrics = root / RUN_FILE, root / METRICS
    config = read_tree(config_file).values if config_file.is_file() else {}
    records = _read_records(metrics) if metrics.is_file() else []
    return RunInputs(
        root=root,
        label=label,
        config=config,
        records=records,
        layers=layers_in({name for record in records for name in record}),
        manifest=read_manifest(root),
        starts=read_starts(root),
        model=_read_optional(root / RESULT / "config.json"),
        evaluation=_find_evaluation(root, config),
    )


def _find_evaluation(root: Path, config: Mapping[str, Any]) -> Evaluation:
    """In the directory itself, or where the run's configuration puts it."""
    section = config.get("evaluate")
    output = section.get("output") if isinstance(section, dict) else None
    directories = [root, root / "evaluation"]
    if isinstance(output, str):
        directories.insert(1, Path(output).expanduser())
    evaluations = map(read_evaluation, directories)
    return next((found for found in evaluations if found.models), Evaluation())


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
    """The shortest ends of the paths that all differ; `evaluation` at least with its parent."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    depths = [max(depth, 2) if path.name == "evaluation" else depth for path in paths]
    return [str(Path(*path.parts[-depth:])) for path, depth in zip(paths, depths, strict=True)]


# ---- evaluations ------------------------------------------------------------------------------


def read_evaluation(root: Path) -> Evaluation:
    """Everything in an evaluation's directory, which need not exist.

    Raises:
        UserError: a file is damaged.
    """
    curves, advice = root / "likelihood" / FILE, root / "likelihood" / "advice.md"
    return Evaluation(
        curves={one.model: one for one in read_curves(curves)} if curves.exists() else {},
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


def _read_optional(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return read_record(path, error=DataError, remedy=_RESTORE) if path.is_file() else {}


def _read_lines[T](path: Path, kind: type[T]) -> list[T]:
    """A dataclass for each line; an incomplete last line is still being written."""
    adapter, values = TypeAdapter(kind), []
    for number, line in enumerate(_read_text(path).split("\n")[:-1], start=1):
        if line.strip():
            try:
                values.append(adapter.validate_json(line, strict=True))
            except ValidationError as error:
                raise DataError.at(f"{path}:{number}", first_error(error), _RESTORE) from None
    return values


def _read_answers(path: Path) -> AnswerSet:
    """The answers so far."""
    answers = {
        (answer.location, str(answer.prompt)): answer for answer in _read_lines(path, Answer)
    }
    return AnswerSet(answers, _read_optional(settings_file(path)))


def _read_comparison(path: Path) -> Comparison:
    try:
        comparison = TypeAdapter(Comparison).validate_json(_read_text(path), strict=True)
    except ValidationError as error:
        raise DataError.at(str(path), first_error(error), _RESTORE) from None
    if _is_outdated(path.parent, comparison):
        return replace(
            comparison, summary=f"{comparison.summary}; the answers have changed since", verdicts={}
        )
    verdicts = path.with_name("verdicts.jsonl")
    if not verdicts.exists():
        return comparison
    return replace(comparison, verdicts=_outcomes(_read_lines(verdicts, Verdict)))


def _is_outdated(directory: Path, comparison: Comparison) -> bool:
    """Whether the judge saw other answers than those that are there, as far as known."""
    digests = _read_optional(directory / "settings.json").get("answers")
    files = {
        side: answers_file(directory.parents[1], name)
        for side, name in (("a", comparison.a), ("b", comparison.b))
    }
    return isinstance(digests, dict) and any(
        file.is_file() and file_digest(file) != digests.get(side) for side, file in files.items()
    )


def _outcomes(verdicts: Sequence[Verdict]) -> dict[int, str]:
    """The outcome of each prompt with verdicts in all orders."""
    winners: dict[int, dict[str, str]] = defaultdict(dict)
    for verdict in verdicts:
        if verdict.verdict is not None:
            winners[verdict.index][verdict.order] = verdict.verdict
    return {
        index: by_order.popitem()[1] if len(set(by_order.values())) == 1 else "disagreed"
        for index, by_order in winners.items()
        if "both" in by_order or len(by_order) == 2
    }
