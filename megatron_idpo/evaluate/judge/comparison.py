"""Pairs of models whose answers are compared, and the questions that this takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, DataError, Problem, UserError
from megatron_idpo.evaluate.generate.answers import Answer, Prompt, answers_file, read_answers
from megatron_idpo.evaluate.judge.template import Letter
from megatron_idpo.evaluate.judge.verdicts import Order, Verdict, VerdictStore, Winner
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
        winner: Winner | None = None
        if letter == "tie":
            winner = "tie"
        elif letter is not None:
            winner = "a" if (letter == "A") == (self.order != "ba") else "b"
        return Verdict(index=self.index, order=self.order, verdict=winner, **fields)


class Judge(Protocol):
    """Answers questions."""

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """Asks the questions; calls `done` with each verdict as soon as it arrives, in any order.

        Raises:
            UserError: asking further questions is pointless; verdicts so far stay valid.
        """


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """The answers of one model."""

    path: Path
    digest: str
    """sha256 of the file."""

    answers: tuple[Answer, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the file.

        Raises:
            DataError: see `read_answers`.
        """
        answers = tuple(read_answers(path))
        return cls(path, file_digest(path), answers)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answers of two models to the same prompts."""

    a: str
    b: str
    answers_a: AnswerFile
    answers_b: AnswerFile
    num_prompts: int
    """The first so many prompts are judged."""

    @property
    def name(self) -> str:
        """Name of its result directory."""
        return f"{self.a}-vs-{self.b}"

    def is_identical(self, index: int) -> bool:
        """Whether both models gave the same answer to a prompt."""
        return self.answers_a.answers[index].answer == self.answers_b.answers[index].answer

    def open_questions(self, store: VerdictStore, orders: tuple[Order, ...]) -> list[Question]:
        """Questions without a verdict; none about identical answers."""
        return [
            Question(index, order, a.prompt, a.answer, b.answer, (index, order) in store.failed)
            for index, (a, b) in enumerate(
                zip(self.answers_a.answers, self.answers_b.answers, strict=True)
            )
            if index < self.num_prompts and a.answer != b.answer
            for order in orders
            if (index, order) not in store.verdicts
        ]


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
    files: dict[str, AnswerFile] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        try:
            files[name] = AnswerFile.read(answers_file(output, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError.of(problems)
    comparisons: dict[str, Comparison] = {}
    for a, b in pairs:
        _check_same_prompts(files[a], files[b])
        count = len(files[a].answers)
        num_prompts = min(config.judge.max_prompts or count, count)
        comparison = Comparison(a, b, files[a], files[b], num_prompts)
        # `a-vs-b` against `c` and `a` against `b-vs-c` would share a directory.
        other = comparisons.setdefault(comparison.name, comparison)
        if other is not comparison:
            message = f"{other.a} against {other.b} and {a} against {b} are both {other.name}"
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
    unknown = dict.fromkeys(name for pair in pairs for name in pair if name not in names)
    problems = [
        Problem("judge.compare", f"unknown model {name}", f"the models are {', '.join(names)}")
        for name in unknown
    ]
    problems += [
        Problem("judge.compare", f"has {a} and {b} in both directions", "keep one of them")
        for a, b in dict.fromkeys(pairs)
        if a < b and (b, a) in pairs
    ]
    if problems:
        raise ConfigError.of(problems)
    return list(dict.fromkeys(pairs))


def _check_same_prompts(a: AnswerFile, b: AnswerFile) -> None:
    """Both files answer the same prompts in the same order.

    Raises:
        DataError: names the first difference.
    """
    remedy = "run `generate` for both with the same configuration"
    for first, second in zip(a.answers, b.answers, strict=False):
        if first.prompt != second.prompt:
            message = (
                f"answers the prompt {second.prompt!r:.60}, but {a.path}:{first.index + 1} "
                f"answers {first.prompt!r:.60}"
            )
            raise DataError.at(f"{b.path}:{second.index + 1}", message, remedy)
    if len(a.answers) != len(b.answers):
        message = f"has {len(b.answers)} answers, but {a.path} has {len(a.answers)}"
        raise DataError.at(str(b.path), message, remedy)
