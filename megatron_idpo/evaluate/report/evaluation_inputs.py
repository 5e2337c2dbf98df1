"""What an evaluation's directory has: layer curves, answers, verdicts, H4, in any combination."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_idpo.checkpoint.snapshot_metadata import file_digest
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.answers import answers_file
from megatron_idpo.evaluate.likelihood.curves_file import FILE, read_curves
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.report.input_files import (
    number,
    read_lines,
    read_object,
    read_text,
    text,
)

LIKELIHOOD, ANSWERS, JUDGE, H4 = "likelihood", "answers", "judge", "h4"
_ADVICE = "advice.md"
_ORDERS = ("ab", "ba", "both")
_VERDICTS = ("a", "b", "tie")

type Prompt = str | tuple[tuple[str, str], ...]
"""Text, or chat messages as role and content."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a prompt."""

    index: int
    """The prompt's number."""

    prompt: Prompt
    text: str
    tokens: int | None
    is_complete: bool
    """Whether it ended by itself."""


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """A model's answers by their prompts' places (`pairs.jsonl:17`), in order."""

    answers: Mapping[str, Answer]
    settings: Mapping[str, Any]
    """What made them."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Two models' answers compared by a judge."""

    a: str
    b: str
    judge: str
    kind: str
    wins: float
    losses: float
    ties: float
    unjudged: float
    rate: float
    low: float
    high: float
    p_value: float
    summary: str
    """The outcome in a sentence."""

    verdicts: Mapping[int, str]
    """By a prompt's number: who wins, `a` or `b`; `tie`, or `disagreed` where it is one because the
    orders do not agree. Empty where they are on other answers than those that are there."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """A model's figures in H4."""

    tasks: Mapping[str, Mapping[str, Any]]
    mean: float
    mean_stderr: float
    source: str
    version: str
    limit: int | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything of a directory; what is not there is empty."""

    curves: Sequence[LayerCurves] = ()
    advice: str = ""
    answers: Mapping[str, AnswerSet] = field(default_factory=dict)
    duels: Sequence[Duel] = ()
    h4: Mapping[str, Tasks] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.curves or self.answers or self.duels or self.h4)

    @property
    def models(self) -> list[str]:
        """The models that something is known of."""
        names = [curves.model for curves in self.curves]
        names += [*self.answers, *(name for duel in self.duels for name in (duel.a, duel.b))]
        return list(dict.fromkeys([*names, *self.h4]))


def read_evaluation(root: Path) -> Evaluation:
    """Everything in an evaluation's directory; of one that does not exist, nothing.

    Raises:
        UserError: a file is damaged; with its place.
    """
    curves, advice = root / LIKELIHOOD / FILE, root / LIKELIHOOD / _ADVICE
    return Evaluation(
        curves=read_curves(curves) if curves.exists() else (),
        advice=read_text(advice, _again("advise")) if advice.exists() else "",
        answers={
            path.stem: _answers(path) for path in sorted((root / ANSWERS).glob("[!.]*.jsonl"))
        },
        duels=[_duel(path) for path in sorted((root / JUDGE).glob("[!.]*/result.json"))],
        h4={path.stem: _tasks(path) for path in sorted((root / H4).glob("[!.]*.json"))},
    )


def _again(verb: str) -> str:
    return f"make it again by `{verb}`"


def _answers(path: Path) -> AnswerSet:
    remedy = _again("generate")
    found: dict[str, Answer] = {}
    for line, values in read_lines(path, remedy):
        tokens, index = (number(values, name) for name in ("answer_tokens", "index"))
        found[text(values, "location", line, remedy)] = Answer(
            int(index) if index == index else len(found),
            _prompt(values.get("prompt"), line),
            text(values, "answer", line, remedy),
            int(tokens) if tokens == tokens else None,
            values.get("is_complete") is not False,
        )
    settings = path.with_suffix(".settings.json")
    return AnswerSet(found, read_object(settings, remedy) if settings.exists() else {})


def _prompt(value: Any, location: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return tuple((str(m.get("role", "")), str(m.get("content", ""))) for m in value)
    reason = f"has a prompt that is neither text nor messages ({type(value).__name__})"
    raise ConfigError.at(location, reason, _again("generate"))


def _duel(path: Path) -> Duel:
    remedy = _again("judge")
    values = read_object(path, remedy)
    words = {name: text(values, name, str(path), remedy) for name in ("a", "b", "summary")}
    verdicts = path.with_name("verdicts.jsonl")
    is_outdated = _is_outdated(path.parent, words["a"], words["b"])
    if is_outdated:
        words["summary"] += "; the answers have been made anew since"
    return Duel(
        **words,
        judge=str(values.get("judge", "")),
        kind=str(values.get("kind", "")),
        wins=number(values, "wins"),
        losses=number(values, "losses"),
        ties=number(values, "ties"),
        unjudged=number(values, "unjudged"),
        rate=number(values, "win_rate"),
        low=number(values, "low"),
        high=number(values, "high"),
        p_value=number(values, "p_value"),
        verdicts=_verdicts(verdicts) if verdicts.exists() and not is_outdated else {},
    )


def _is_outdated(directory: Path, a: str, b: str) -> bool:
    """Whether a comparison is of other answers than those that are there; where known."""
    settings = directory / "settings.json"
    judged = read_object(settings, _again("judge")).get("answers") if settings.exists() else None
    if not isinstance(judged, dict):
        return False
    files = {side: answers_file(directory.parents[1], name) for side, name in (("a", a), ("b", b))}
    return any(
        file.is_file() and file_digest(file) != judged.get(side) for side, file in files.items()
    )


def _verdicts(path: Path) -> dict[int, str]:
    """What a prompt's verdicts come to; where an order has none, the prompt is left out."""
    remedy = _again("judge")
    standing: dict[int, dict[str, str]] = {}
    for line, values in read_lines(path, remedy):
        order, verdict, index = values.get("order"), values.get("verdict"), values.get("index")
        if verdict is None:
            continue
        if order not in _ORDERS or verdict not in _VERDICTS or not isinstance(index, int):
            raise ConfigError.at(line, f"is no verdict: {verdict!r}, order {order!r}", remedy)
        standing.setdefault(index, {})[order] = verdict
    found = {}
    for index, verdicts in standing.items():
        if "both" in verdicts or len(verdicts) == 2:
            winners = set(verdicts.values())
            found[index] = winners.pop() if len(winners) == 1 else "disagreed"
    return found


def _tasks(path: Path) -> Tasks:
    remedy = _again("h4")
    values = read_object(path, remedy)
    tasks = values.get("tasks")
    if not isinstance(tasks, dict) or not all(isinstance(one, dict) for one in tasks.values()):
        raise ConfigError.at(str(path), "has no tasks", remedy)
    limit = number(values, "limit")
    return Tasks(
        tasks,
        number(values, "mean"),
        number(values, "mean_stderr"),
        str(values.get("source", "")),
        str(values.get("lm_eval", "")),
        int(limit) if limit == limit else None,
    )
