"""Sample answers: some prompts with all models' answers, selected without looking at them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_idpo.evaluate.generate.answers import Answer
from megatron_idpo.evaluate.report.inputs import (
    AnswerSet,
    PromptKey,
    RunInputs,
    comparisons,
    merge_models,
)

NUM_SAMPLES = 8
MAX_CHARACTERS = 450
"""Shown of a long text; the rest is folded."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, its answers, and the judge's verdicts."""

    location: str
    messages: Sequence[tuple[str, str]]
    """Role and text; the role of a plain prompt is empty."""

    replies: Sequence[tuple[str, Answer]]
    """Label of the model, and its answer."""

    verdicts: Sequence[str]


def clip(text: str) -> tuple[str, str]:
    """Cut a long text at a space; a few more characters are not worth a cut."""
    if len(text) <= MAX_CHARACTERS * 1.2:
        return text, ""
    cut = text.rfind(" ", MAX_CHARACTERS // 2, MAX_CHARACTERS)
    cut = cut if cut > 0 else MAX_CHARACTERS
    return text[:cut], text[cut:].lstrip(" ")


def answer_sets(runs: Sequence[RunInputs]) -> dict[str, AnswerSet]:
    """The answers of all models by label."""
    return merge_models(runs, lambda evaluation: evaluation.answers)


def select_samples(runs: Sequence[RunInputs]) -> list[Sample]:
    """Evenly spaced prompts out of those that all models answered, or else any model."""
    sets = answer_sets(runs)
    every = list(dict.fromkeys(key for answers in sets.values() for key in answers.answers))
    common = [key for key in every if all(key in answers.answers for answers in sets.values())]
    keys = common or every
    samples = []
    for at in np.linspace(0, len(keys) - 1, min(NUM_SAMPLES, len(keys))).round().astype(int):
        replies = [
            (model, answers.answers[keys[at]])
            for model, answers in sets.items()
            if keys[at] in answers.answers
        ]
        prompt = replies[0][1].prompt
        messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
        texts = [(str(part.get("role", "")), str(part.get("content", ""))) for part in messages]
        samples.append(Sample(keys[at][0], texts, replies, list(_verdicts(keys[at], runs))))
    return samples


def _verdicts(key: PromptKey, runs: Sequence[RunInputs]) -> Iterator[str]:
    """The outcome of each comparison on the prompt."""
    for run, prefix, comparison in comparisons(runs):
        a, b = comparison.a, comparison.b
        texts = {
            "a": f"{a} over {b}",
            "b": f"{b} over {a}",
            "tie": f"{a} and {b} tied",
            "disagreed": f"{a} and {b} tied: the verdict flipped when the answers were swapped",
        }
        answers = run.evaluation.answers.get(a)
        answer = answers.answers.get(key) if answers else None
        if answer is not None and answer.index in comparison.verdicts:
            yield prefix + texts[comparison.verdicts[answer.index]]
