"""The sections `evaluate`, `generate`, `judge` and `h4`: which models are compared, and how."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, Strict, WithJsonSchema

from megatron_idpo.config.data import Sources
from megatron_idpo.config.section import (
    Distinct,
    Fp32,
    FromPath,
    Int,
    NonEmpty,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from megatron_idpo.errors import Problem

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
"""A model's name in `evaluate.models`, which becomes a file name."""

H4Task = Literal["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]
H4_TASKS: tuple[H4Task, ...] = get_args(H4Task)


class EvalModelConfig(Section):
    """A model to evaluate."""

    path: PathText
    """A Hugging Face directory, a hub name, or the `training.output` of a finished run, for its
    result."""

    adapter: PathText | None = None
    """Directory of a PEFT adapter for it."""


class EvaluateConfig(Section):
    """Which models are compared, and where results go (docs/evaluation.md)."""

    models: Annotated[
        Mapping[ModelName, Annotated[EvalModelConfig, FromPath]],
        WithJsonSchema({"type": "mapping of name to path or model"}),
    ] = {}
    """The models by name, each a path or `{path, adapter}`. Empty means `base`, the `model.path`,
    and `trained`, the result of the run in `training.output`."""

    output: PathText | None = None
    """Directory of the results; null is `evaluation` in `training.output`."""

    bootstrap_samples: PositiveInt = 2000
    """Bootstrap resamples of the held-out prompts for confidence intervals."""

    seed: Int = 0
    """Seed of the bootstrap and of sampled answers."""


class GenerateConfig(Section):
    """Generating answers to prompts; the defaults are those of the intermediate-DPO paper."""

    prompts: Sources | None = None
    """Prompts, written like `data.train`: preference pairs, or records with only a `prompt`. null
    takes each prompt of the held-out pairs once."""

    max_prompts: PositiveInt | None = None
    """Take a random sample of this many, drawn with `evaluate.seed`; null takes all."""

    temperature: NonNegativeFloat = 0.3
    """Sampling temperature; 0 is greedy decoding."""

    repetition_penalty: PositiveFloat = 1.1
    """Penalty of tokens that already occurred, in the prompt as well; 1 is none."""

    top_p: Annotated[float, Strict(), Field(gt=0, le=1), Fp32] = 1.0
    """Nucleus sampling: the probability mass of the tokens to sample from."""

    max_new_tokens: PositiveInt = 512
    """Maximum length of an answer in tokens."""

    batch_prompts: PositiveInt = 8
    """Prompts per batch; sampled answers depend on it."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """`auto` is vLLM if it is installed and there is a GPU."""

    used_with: ClassVar = {"top_p": ("temperature",)}


_LOCAL_JUDGE_FIELDS = {"model", "kind", "compare", "template", "max_prompts"}
"""Fields of `judge` that a local judge uses; the others are for an endpoint."""


class JudgeConfig(Section):
    """Comparing answers pairwise with a judge."""

    model: Text
    """The judge: a model name of the endpoint, or the directory or hub name of a local model."""

    kind: Literal["api", "reward", "language_model"] = "api"
    """An OpenAI-compatible endpoint, or locally a reward model (sequence classification) or a
    language model that is prompted with the template."""

    compare: tuple[Annotated[tuple[Text, Text], Distinct], ...] | None = None
    """Pairs of names from `evaluate.models`, the first against the second; null is the last model
    against each other one."""

    template: PathText | None = None
    """A Jinja file with the judge's instructions; null is the built-in one."""

    max_prompts: PositiveInt | None = None
    """Judge only the first N prompts; null judges all."""

    base_url: Text = "https://api.openai.com/v1"
    """URL of the endpoint."""

    key_variable: Text = "OPENAI_API_KEY"
    """The environment variable that holds the API key."""

    max_parallel: PositiveInt = 8
    """Concurrent requests."""

    requests_per_minute: PositiveInt | None = None
    """Request limit; null relies on the rate limits of the endpoint."""

    timeout_s: PositiveFloat = 60.0
    """Seconds after which a request fails."""

    max_attempts: PositiveInt = 6
    """Attempts per question, with exponential backoff; also if an answer has no verdict, unless it
    was cut off at temperature 0."""

    max_tokens: PositiveInt = 512
    """Maximum length of the judge's answer in tokens."""

    input_price: NonNegativeFloat | None = None
    """Price of a million input tokens, in any currency; with `output_price`, estimates the cost."""

    output_price: NonNegativeFloat | None = None
    """Price of a million output tokens."""

    max_cost: PositiveFloat | None = None
    """Do not start if the estimated cost is higher."""

    used_with: ClassVar = {"template": ("kind", "api", "language_model")}

    def problems(self) -> Iterator[Problem]:
        """Fields that only an endpoint uses, and prices without which there is no estimate."""
        if self.kind != "api":
            for name in type(self).model_fields.keys() - _LOCAL_JUDGE_FIELDS:
                if self._is_set(name):
                    yield Problem(name, f"has no effect: kind is {self.kind}", "leave it out")
            return
        if (self.input_price is None) != (self.output_price is None):
            name = "input_price" if self.input_price is None else "output_price"
            yield Problem(name, "is missing, the other price is set", "set both or none")
        elif self.max_cost is not None and self.input_price is None:
            yield Problem("max_cost", "has no effect: there are no prices", "set both prices")


class H4Config(Section):
    """The four tasks of the sDPO paper's table, by lm-eval."""

    tasks: Annotated[tuple[H4Task, ...], NonEmpty, Distinct] = H4_TASKS
    """ARC (25-shot), HellaSwag (10-shot), MMLU (5-shot), TruthfulQA (0-shot, mc2)."""

    items: PathText | None = None
    """A directory with the items of each task as jsonl (docs/evaluation.md); null downloads them
    from the hub."""

    limit: PositiveInt | None = None
    """Only the first N items of each task (MMLU: of each subject); null takes all."""

    batch_size: PositiveInt = 8
    """Requests per batch."""
