"""Which answers are compared, and whether they can be."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, DataError, Problem, UserError
from megatron_idpo.evaluate.generate.answers import Answer, answers_file, read_answers
from megatron_idpo.evaluate.judge.question import Question
from megatron_idpo.evaluate.judge.verdicts import Order, VerdictStore
from megatron_idpo.evaluate.models import BASE, TRAINED


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """The answers of one model."""

    path: Path
    digest: str
    """sha256 of the file."""

    answers: tuple[Answer, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it.

        Raises:
            DataError: see `read_answers`.
        """
        answers = tuple(read_answers(path))
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest(), answers)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models' answers to the same prompts."""

    a: str
    b: str
    answers_a: AnswerFile
    answers_b: AnswerFile
    prompts: int
    """How many are judged, the first ones."""

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.a}-vs-{self.b}"

    def is_identical(self, index: int) -> bool:
        """Whether both models answered a prompt with the same text."""
        return self._answer("a", index).answer == self._answer("b", index).answer

    def left(self, store: VerdictStore, orders: tuple[Order, ...]) -> list[Question]:
        """What is left to ask; nothing is asked about identical answers."""
        found = []
        for index in range(self.prompts):
            a, b = self._answer("a", index), self._answer("b", index)
            for order in () if self.is_identical(index) else orders:
                if (index, order) not in store.standing:
                    failed = (index, order) in store.failed
                    found.append(Question(index, order, a.prompt, a.answer, b.answer, failed))
        return found

    def _answer(self, which: str, index: int) -> Answer:
        return (self.answers_a if which == "a" else self.answers_b).answers[index]


def comparisons(config: RunConfig, output: Path) -> list[Comparison]:
    """Everything that `judge.compare` asks for.

    The models themselves need not be there, only their answers.

    Args:
        config: with the section `judge`.
        output: of the evaluation.

    Raises:
        ConfigError: it names a model that is none, or there is nothing to compare.
        DataError: answers are missing, or are to different prompts.
    """
    assert config.judge is not None
    pairs = _pairs(config)
    found: dict[str, AnswerFile] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        try:
            found[name] = AnswerFile.read(answers_file(output, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError.of(problems)
    for a, b in pairs:
        _same_prompts(found[a], found[b])
    most = config.judge.max_prompts
    asked = [
        Comparison(a, b, found[a], found[b], min(most or count, count))
        for a, b in pairs
        for count in (len(found[a].answers),)
    ]
    _check_names(asked)
    return asked


def _check_names(asked: Sequence[Comparison]) -> None:
    """No two comparisons have one directory, as `a-vs-b` against `c` and `a` against `b-vs-c`.

    Raises:
        ConfigError: two do.
    """
    locations: dict[str, Comparison] = {}
    for one in asked:
        other = locations.setdefault(one.name, one)
        if other is not one:
            message = f"{other.a} against {other.b} and {one.a} against {one.b} are both {one.name}"
            raise ConfigError.at("evaluate.models", message, "give a model another name")


def _pairs(config: RunConfig) -> list[tuple[str, str]]:
    assert config.judge is not None
    names = tuple(config.evaluate.models) or (BASE, TRAINED)
    if config.judge.compare is None:
        if len(names) == 1:
            message = f"names {names[0]} alone, so there is nothing to compare"
            raise ConfigError.at("evaluate.models", message, "name another model")
        return [(names[-1], name) for name in names[:-1]]
    unknown = {name: None for pair in config.judge.compare for name in pair if name not in names}
    problems = [
        Problem("judge.compare", f"names {name}", f"the models are {', '.join(names)}")
        for name in unknown
    ]
    problems += [
        Problem("judge.compare", f"names {a} and {b} in both directions", "keep one of them")
        for a, b in dict.fromkeys(config.judge.compare)
        if a < b and (b, a) in config.judge.compare
    ]
    if not config.judge.compare:
        problems = [Problem("judge.compare", "is empty", "name pairs, or leave it out")]
    if problems:
        raise ConfigError.of(problems)
    return list(dict.fromkeys(config.judge.compare))


def _same_prompts(a: AnswerFile, b: AnswerFile) -> None:
    """Both files answer the same prompts in the same order.

    Raises:
        DataError: naming the first difference.
    """
    remedy = "let `generate` write both with the same configuration"
    for first, second in zip(a.answers, b.answers, strict=False):
        if first.prompt != second.prompt:
            message = (
                f"answers the prompt {_start(second)}, but {a.path}:{first.index + 1} answers "
            )
            location = f"{b.path}:{second.index + 1}"
            raise DataError.at(location, f"{message}{_start(first)}", remedy)
    if len(a.answers) != len(b.answers):
        message = f"has {len(b.answers)} answers, but {a.path} has {len(a.answers)}"
        raise DataError.at(str(b.path), message, remedy)


def _start(answer: Answer) -> str:
    """Enough of a prompt to know it by."""
    return f"{answer.prompt!r:.60}"
