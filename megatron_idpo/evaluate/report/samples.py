"""Sample answers: some prompts with all models' answers, selected without looking at them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_idpo.evaluate.generate.answers import Answer, Prompt
from megatron_idpo.evaluate.report.inputs import AnswerSet, RunInputs, merge_models
from megatron_idpo.evaluate.report.sections import comparisons

NUM_SAMPLES = 8
MAX_CHARACTERS = 450
"""Shown of a long text; the rest is folded."""


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text in two parts; the second is folded, and empty for a short text."""

    start: str
    rest: str

    @classmethod
    def of(cls, text: str) -> "Clipped":
        """Cut a long text at a space; a few more characters are not worth a cut."""
        if len(text) <= MAX_CHARACTERS * 1.2:
            return cls(text, "")
        cut = text.rfind(" ", MAX_CHARACTERS // 2, MAX_CHARACTERS)
        cut = cut if cut > 0 else MAX_CHARACTERS
        return cls(text[:cut], text[cut:].lstrip(" "))


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer."""

    model: str
    answer: Answer
    text: Clipped


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, its answers, and the judge's verdicts."""

    location: str
    messages: Sequence[tuple[str, Clipped]]
    """Role and text; the role of a plain prompt is empty."""

    replies: Sequence[Reply]
    verdicts: Sequence[str]


def answer_sets(runs: Sequence[RunInputs]) -> dict[str, AnswerSet]:
    """The answers of all models by label."""
    return merge_models(
        runs,
        lambda run: run.evaluation.answers,
        lambda answers, other: answers.answers == other.answers,
    )


def select_samples(runs: Sequence[RunInputs]) -> list[Sample]:
    """Evenly spaced prompts out of those that all models answered, or else any model."""
    sets = answer_sets(runs)
    prompts: list[tuple[str, Prompt]] = []
    for answers in sets.values():
        prompts += [
            (location, answer.prompt)
            for location, answer in answers.answers.items()
            if (location, answer.prompt) not in prompts
        ]
    common = [key for key in prompts if all(_answer(answers, *key) for answers in sets.values())]
    prompts = common or prompts
    if not prompts:
        return []
    selected = np.linspace(0, len(prompts) - 1, min(NUM_SAMPLES, len(prompts))).round().astype(int)
    return [_sample(prompts[at][0], prompts[at][1], sets, runs) for at in selected]


def _answer(answers: AnswerSet, location: str, prompt: Prompt) -> Answer | None:
    """The answer to a prompt; two runs may have had different files of the same name."""
    answer = answers.answers.get(location)
    return answer if answer is not None and answer.prompt == prompt else None


def _sample(
    location: str, prompt: Prompt, sets: Mapping[str, AnswerSet], runs: Sequence[RunInputs]
) -> Sample:
    replies = [
        Reply(model, answer, Clipped.of(answer.answer))
        for model, answers in sets.items()
        if (answer := _answer(answers, location, prompt)) is not None
    ]
    messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [(str(m.get("role", "")), Clipped.of(str(m.get("content", "")))) for m in messages]
    return Sample(location, texts, replies, list(_verdicts(location, prompt, runs)))


def _verdicts(location: str, prompt: Prompt, runs: Sequence[RunInputs]) -> Iterator[str]:
    """The outcome of each comparison on the prompt."""
    for run, prefix, comparison in comparisons(runs):
        answers = run.evaluation.answers.get(comparison.a)
        answer = _answer(answers, location, prompt) if answers else None
        verdict = comparison.verdicts.get(answer.index) if answer else None
        tied = f"{comparison.a} and {comparison.b} tied"
        texts = {
            "a": f"{comparison.a} over {comparison.b}",
            "b": f"{comparison.b} over {comparison.a}",
            "tie": tied,
            "disagreed": f"{tied}: the verdict flipped when the answers were swapped",
        }
        if verdict is not None:
            yield prefix + texts[verdict]
