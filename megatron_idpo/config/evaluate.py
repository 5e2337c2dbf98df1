"""The sections that say how models are compared: what is compared, answers, judges, H4.

Fields only; what is done with them is in `evaluate/`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, Strict

from megatron_idpo.config.sections import (
    Int,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Sources,
    Text,
)
from megatron_idpo.errors import Problem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""What a model may be called: it becomes the name of files."""

H4Task = Literal["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]
H4_TASKS: tuple[H4Task, ...] = get_args(H4Task)


class SubjectConfig(Section):
    """One model that is evaluated."""

    path: PathText
    """A Hugging Face directory, a hub name, or the `training.output` of a finished run, which
    stands for its result."""

    adapter: PathText | None = None
    """The directory of a PEFT adapter on it."""


def _as_subjects(value: Any) -> Any:
    """A path by itself as what it stands for."""
    if not isinstance(value, dict):
        return value
    return {
        name: {"path": subject} if isinstance(subject, str) else subject
        for name, subject in value.items()
    }


def _as_tuples(value: Any) -> Any:
    """Lists in a list as tuples, so that the section stays immutable."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(part) if isinstance(part, list) else part for part in value)


class EvaluateConfig(Section):
    """What is compared, and where results go (docs/evaluation.md)."""

    models: Annotated[Mapping[Text, SubjectConfig], BeforeValidator(_as_subjects)] = {}
    """The models by name, each a path or `{path, adapter}`. Empty: `base` is `model.path` and
    `trained` the result of the run in `training.output`."""

    output: PathText | None = None
    """Directory of the results; null is `evaluation` in `training.output`."""

    bootstrap_samples: PositiveInt = 2000
    """Resamples of the held-out prompts from which intervals are taken."""

    seed: Int = 0
    """Of resampling and of sampled answers."""

    def problems(self) -> list[Problem]:
        """Names that cannot be files' names."""
        return [
            Problem("models", f"has the name {name!r}", "use letters, digits, dots, - and _")
            for name in self.models
            if not _NAME.fullmatch(name)
        ]


class GenerateConfig(Section):
    """Answers to prompts, by default as the intermediate-DPO paper sampled them."""

    prompts: Sources | None = None
    """Prompts written like `data.train`: preference pairs or records with a `prompt` alone. null
    takes the held-out pairs' prompts, each once."""

    max_prompts: PositiveInt | None = None
    """Take this many of them, chosen by `evaluate.seed`; null takes all."""

    temperature: NonNegativeFloat = 0.3
    """0 takes the likeliest token."""

    repetition_penalty: PositiveFloat = 1.1
    """Of tokens that occurred, in the prompt too; 1 is none."""

    top_p: Annotated[float, Strict(), Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that make up this share."""

    max_new_tokens: PositiveInt = 512
    """Where an answer is cut off."""

    batch_prompts: PositiveInt = 8
    """Prompts that are answered at once; with another number, sampled answers are others."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto` is vLLM where it is installed and a GPU is there."""

    def problems(self) -> list[Problem]:
        """What a temperature of 0 leaves unread."""
        if self.temperature:
            return []
        return self._unread("top_p", "temperature is 0", "leave it out, or set a temperature")


class JudgeConfig(Section):
    """Who judges which answers."""

    model: Text
    """The judge: a name that the endpoint knows, or a local model's directory or hub name."""

    kind: Literal["api", "reward", "language_model"] = "api"
    """An OpenAI-compatible endpoint; or, without a network, a reward model (sequence
    classification) or a language model that is given the template."""

    compare: Annotated[tuple[tuple[Text, Text], ...] | None, BeforeValidator(_as_tuples)] = None
    """Pairs of names in `evaluate.models`, the first against the second; null is the last model
    against each of the others."""

    template: PathText | None = None
    """A Jinja file with the judge's instructions; null is the one that comes with the package."""

    max_prompts: PositiveInt | None = None
    """Judge this many prompts, the first ones; null judges all."""

    base_url: Text = "https://api.openai.com/v1"
    """Of the endpoint."""

    key_variable: Text = "OPENAI_API_KEY"
    """The environment variable that has the key."""

    max_parallel: PositiveInt = 8
    """Requests under way at once."""

    requests_per_minute: PositiveInt | None = None
    """At most; null leaves it to the endpoint, whose rate limits are waited out."""

    timeout_s: PositiveFloat = 60.0
    """After which a request counts as failed."""

    max_attempts: PositiveInt = 6
    """Of one question, with growing pauses; also of one that is answered without a verdict, unless
    the answer was cut off at a temperature of 0."""

    max_tokens: PositiveInt = 512
    """Of the judge's answer."""

    input_price: NonNegativeFloat | None = None
    """For a million tokens, in whatever currency; with `output_price` the cost is estimated."""

    output_price: NonNegativeFloat | None = None
    """Likewise."""

    max_cost: PositiveFloat | None = None
    """Refuse to begin where the estimate is above this."""

    def problems(self) -> list[Problem]:
        """Fields that another judge reads."""
        found = []
        if self.kind != "api":
            for name in (
                "base_url",
                "key_variable",
                "max_parallel",
                "requests_per_minute",
                "timeout_s",
                "max_attempts",
                "max_tokens",
                "input_price",
                "output_price",
                "max_cost",
            ):
                found += self._unread(name, f"kind is {self.kind}", "leave it out")
        elif (self.input_price is None) != (self.output_price is None):
            name = "input_price" if self.input_price is None else "output_price"
            found.append(Problem(name, "is missing beside the other price", "set both or none"))
        elif self.input_price is None:
            found += self._unread("max_cost", "there are no prices", "set both prices")
        if self.kind == "reward":
            found += self._unread("template", "kind is reward", "leave it out")
        for pair in self.compare or ():
            if pair[0] == pair[1]:
                message = f"compares {pair[0]} with itself"
                found.append(Problem("compare", message, "name two different models"))
        return found


class H4Config(Section):
    """The four tasks of the sDPO paper's table, by lm-eval."""

    tasks: Annotated[tuple[H4Task, ...], BeforeValidator(_as_tuples)] = H4_TASKS
    """ARC (25 examples), HellaSwag (10), MMLU (5), TruthfulQA (none; mc2)."""

    items: PathText | None = None
    """A directory with the tasks' items as jsonl, named after the tasks (docs/evaluation.md); null
    takes them from the hub."""

    limit: PositiveInt | None = None
    """Items of each task, the first ones (of MMLU: of each subject); null takes all."""

    batch_size: PositiveInt = 8
    """Requests at once."""

    def problems(self) -> list[Problem]:
        """No task, or one twice."""
        if not self.tasks:
            return [Problem("tasks", "names no task", f"name some of {', '.join(H4_TASKS)}")]
        if len(set(self.tasks)) < len(self.tasks):
            return [Problem("tasks", "names a task twice", "name each once")]
        return []
