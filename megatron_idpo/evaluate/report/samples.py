"""Some prompts with all models' answers beside each other, chosen without looking at them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_idpo.evaluate.report.evaluation_inputs import Answer, AnswerSet, Prompt
from megatron_idpo.evaluate.report.inputs import Found

SAMPLES = 8
CLIPPED_CHARACTERS = 450
"""What is shown of a long text at once."""


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text in two parts, the second one shown on request; empty where the text is short."""

    start: str
    rest: str

    @classmethod
    def of(cls, text: str) -> "Clipped":
        """Cut at a space, if the text is long; a few more characters are not worth a cut."""
        if len(text) <= CLIPPED_CHARACTERS * 1.2:
            return cls(text, "")
        cut = text.rfind(" ", CLIPPED_CHARACTERS // 2, CLIPPED_CHARACTERS)
        cut = cut if cut > 0 else CLIPPED_CHARACTERS
        return cls(text[:cut], text[cut:].lstrip(" "))


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer."""

    model: str
    answer: Answer
    text: Clipped


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the answers to it, and what a judge says of them."""

    location: str
    messages: Sequence[tuple[str, Clipped]]
    """Role and text; the role of a plain prompt is empty."""

    replies: Sequence[Reply]
    verdicts: Sequence[str]


def answer_sets(runs: Sequence[Found]) -> dict[str, AnswerSet]:
    """All models' answers; one that several runs have the same answers of is there once."""
    named: dict[str, AnswerSet] = {}
    for run in runs:
        for model, answers in run.evaluation.answers.items():
            if len(runs) == 1:
                named[model] = answers
                continue
            others = [one.evaluation.answers.get(model) for one in runs if one is not run]
            is_shared = any(one is not None and one.answers == answers.answers for one in others)
            twin = named.get(model)
            if is_shared and (twin is None or twin.answers == answers.answers):
                named[model] = answers
            else:
                named[f"{run.label} · {model}"] = answers
    return named


def samples(runs: Sequence[Found]) -> list[Sample]:
    """Prompts at even distances, of those that all models have answered, else that any has."""
    sets = answer_sets(runs)
    every = list(
        dict.fromkeys(
            (location, answer.prompt)
            for one in sets.values()
            for location, answer in one.answers.items()
        )
    )
    prompts = [key for key in every if all(_to(one, *key) for one in sets.values())] or every
    if not prompts:
        return []
    chosen = np.linspace(0, len(prompts) - 1, min(SAMPLES, len(prompts))).round().astype(int)
    return [
        _sample(location, prompt, sets, runs) for location, prompt in (prompts[n] for n in chosen)
    ]


def _to(one: AnswerSet, location: str, prompt: Prompt) -> Answer | None:
    """The answer to a prompt; runs may have had other data in a file of the same name."""
    answer = one.answers.get(location)
    return answer if answer is not None and answer.prompt == prompt else None


def _sample(
    location: str, prompt: Prompt, sets: Mapping[str, AnswerSet], runs: Sequence[Found]
) -> Sample:
    replies = [
        Reply(model, answer, Clipped.of(answer.text))
        for model, one in sets.items()
        if (answer := _to(one, location, prompt)) is not None
    ]
    messages = (("", prompt),) if isinstance(prompt, str) else prompt
    return Sample(
        location,
        [(role, Clipped.of(content)) for role, content in messages],
        replies,
        list(_verdicts(location, prompt, runs)),
    )


def _verdicts(location: str, prompt: Prompt, runs: Sequence[Found]) -> Iterator[str]:
    """What each comparison says of the prompt, in words."""
    judged = [run for run in runs if run.evaluation.duels]
    for run in judged:
        for duel in run.evaluation.duels:
            answers = run.evaluation.answers.get(duel.a)
            answer = _to(answers, location, prompt) if answers else None
            verdict = duel.verdicts.get(answer.index) if answer else None
            if verdict is not None:
                prefix = f"{run.label}: " if len(judged) > 1 else ""
                message = {
                    "a": f"{duel.a} over {duel.b}",
                    "b": f"{duel.b} over {duel.a}",
                    "tie": f"{duel.a} and {duel.b} tied",
                    "disagreed": f"{duel.a} and {duel.b} tied: the two orders disagree",
                }[verdict]
                yield f"{prefix}{message}"
