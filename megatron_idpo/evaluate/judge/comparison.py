"""Pairs of models whose answers are compared, and the questions that this takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.generate.answers import Answer, Prompt, answers_file, read_answers
from megatron_idpo.evaluate.judge.template import Letter
from megatron_idpo.evaluate.judge.verdicts import IDENTICAL, Order, Verdict, VerdictStore, Winner
from megatron_idpo.evaluate.models import BASE, TRAINED
from megatron_idpo.storage.provenance import file_digest


@dataclass(frozen=True, slots=True)
class Question:
    """Which of two answers is better?"""

    index: int
    """Index of the prompt."""

    order: Order
    prompt: Prompt
    a: str
    """Answer of the first model of the comparison."""

    b: str
    has_failed: bool = False
    """Whether it got no verdict in an earlier run."""

    @property
    def shown(self) -> tuple[str, str]:
        """Both answers in the order in which they are shown."""
        return (self.b, self.a) if self.order == "ba" else (self.a, self.b)

    def verdict(self, letter: Letter | None, **fields: Any) -> Verdict:
        """The verdict on this question.

        Args:
            letter: A is the answer shown first; None: there is no verdict.
            fields: further fields of `Verdict`.
        """
        winners: dict[Letter | None, Winner] = {"A": "a", "B": "b", "tie": "tie"}
        if self.order == "ba":
            winners |= {"A": "b", "B": "a"}
        return Verdict(index=self.index, order=self.order, verdict=winners.get(letter), **fields)


class Judge(Protocol):
    """Answers questions."""

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """Asks the questions; calls `done` with each verdict as soon as it arrives, in any order.

        Raises:
            UserError: asking further questions is pointless; verdicts so far stay valid.
        """


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answers of two models to the same prompts."""

    a: str
    b: str
    directory: Path
    """Of its results."""

    answers: Sequence[tuple[Answer, Answer]]
    """Of both models to each prompt that is judged."""

    settings: dict[str, Any]
    """Names of both models and digests of their answers, as stored with the verdicts."""

    @property
    def title(self) -> str:
        """Both names, for messages."""
        return f"{self.a} against {self.b}"

    def open_questions(self, store: VerdictStore, orders: tuple[Order, ...]) -> list[Question]:
        """Questions without a verdict. Identical answers are stored as ties instead of asked."""
        questions = []
        for index, (a, b) in enumerate(self.answers):
            if (index, "both") in store.verdicts:
                continue
            if a.answer == b.answer:
                store.add(Verdict(index=index, order="both", verdict="tie", note=IDENTICAL))
                continue
            questions += [
                Question(index, order, a.prompt, a.answer, b.answer, (index, order) in store.failed)
                for order in orders
                if (index, order) not in store.verdicts
            ]
        return questions


def load_comparisons(config: RunConfig, output: Path) -> list[Comparison]:
    """Every comparison of `judge.compare`; only the answers are needed, not the models.

    Args:
        config: with the section `judge`.
        output: directory of the evaluation.

    Raises:
        ConfigError: a model is unknown, or there is nothing to compare.
        DataError: answers are missing, or belong to different prompts.
    """
    assert config.judge is not None
    pairs = _pairs(config)
    paths = {name: answers_file(output, name) for pair in pairs for name in pair}
    answers = {name: read_answers(path) for name, path in paths.items()}
    digests = {name: file_digest(path) for name, path in paths.items()}
    comparisons: dict[Path, Comparison] = {}
    for a, b in pairs:
        paired = _same_prompts(answers[a], answers[b], paths[a], paths[b])
        settings = {"a": a, "b": b, "answers": {"a": digests[a], "b": digests[b]}}
        directory = output / "judge" / f"{a}-vs-{b}"
        comparison = Comparison(a, b, directory, paired[: config.judge.max_prompts], settings)
        # `a-vs-b` against `c` and `a` against `b-vs-c` would share a directory.
        other = comparisons.setdefault(directory, comparison)
        if other is not comparison:
            message = f"{other.title} and {comparison.title} are both {directory.name}"
            raise ConfigError.at("evaluate.models", message, "rename one of the models")
    return list(comparisons.values())


def _pairs(config: RunConfig) -> list[tuple[str, str]]:
    assert config.judge is not None
    names = tuple(config.evaluate.models) or (BASE, TRAINED)
    pairs = config.judge.compare
    if pairs is None:
        if len(names) == 1:
            message = f"has only {names[0]}, so there is nothing to compare"
            raise ConfigError.at("evaluate.models", message, "add another model")
        return [(names[-1], name) for name in names[:-1]]
    if not pairs:
        raise ConfigError.at("judge.compare", "is empty", "name pairs, or leave it out")
    for a, b in pairs:
        if unknown := {a, b}.difference(names):
            message = f"unknown model {min(unknown)}"
            raise ConfigError.at("judge.compare", message, f"the models are {', '.join(names)}")
        if (b, a) in pairs:
            message = f"has {a} and {b} in both directions"
            raise ConfigError.at("judge.compare", message, "keep one of them")
    return list(dict.fromkeys(pairs))


def _same_prompts(
    a: Sequence[Answer], b: Sequence[Answer], path_a: Path, path_b: Path
) -> list[tuple[Answer, Answer]]:
    """Pairs the answers to the same prompts, which both files have in the same order.

    Raises:
        DataError: names the first difference.
    """
    remedy = "run `generate` for both with the same configuration"
    pairs = list(zip(a, b, strict=False))
    for line, (first, second) in enumerate(pairs, start=1):
        if first.prompt != second.prompt:
            message = f"answers another prompt than {path_a}:{line}: {second.prompt!r:.60}"
            raise DataError.at(f"{path_b}:{line}", f"{message}, not {first.prompt!r:.60}", remedy)
    if len(a) != len(b):
        message = f"has {len(b)} answers, but {path_a} has {len(a)}"
        raise DataError.at(str(path_b), message, remedy)
    return pairs
