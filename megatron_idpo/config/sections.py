"""The sections of a configuration: what each verb may be told, typed, bounded and documented.

A section is one class here and one line in `config.RunConfig`; its docstring and the strings under
its fields become `docs/configuration.md`. A field that the section's other fields leave unread is a
mistake, reported by `problems`. Values are checked strictly: `true` is no number, `"8"` neither.
Here are the model, its data and its layout; `config_objective.py` has what is learnt,
`config_training.py` how. Not here: reading files, and what concerns several sections (`config.py`).
"""

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.parallel.layout import Layout

if TYPE_CHECKING:
    import torch

Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict(), Field(ge=0)]
PositiveInt = Annotated[int, Strict(), Field(gt=0)]
PositiveFloat = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Strict(), Field(ge=0, le=1)]
Fraction = Annotated[float, Strict(), Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, in which a leading `~` is the home directory; hub names and patterns stay as they are."""

Format = Literal["auto", "text", "chat", "hh", "single_turn"]
"""What the records of a dataset are (`data/preferences.py`)."""


class SectionError(ValueError):
    """The problems of a section as a whole; their places are fields of it."""

    def __init__(self, problems: list[Problem]) -> None:
        """Keep the problems for whoever knows where the section was written."""
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


class Section(BaseModel):
    """A frozen group of fields that refuses unknown ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def problems(self) -> list[Problem]:
        """What is wrong between this section's fields; `Problem.place` is a field's name."""
        return []

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        found = self.problems()
        if found:
            raise SectionError(found)
        return self

    def _unread(self, name: str, because: str, remedy: str) -> list[Problem]:
        """A problem if the user gave a field a value that this configuration does not read."""
        if getattr(self, name) == type(self).model_fields[name].default:
            return []
        return [Problem(name, f"would not be read: {because}", remedy)]


class ModelConfig(Section):
    """The model to start from."""

    path: PathText
    """A Hugging Face directory, a hub name, or a `torch_dist` checkpoint of ours."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What weights are held and computed in, whatever the checkpoint has."""

    tokenizer: PathText | None = None
    """Directory or hub name of the tokenizer, or a sentencepiece `.model` file; null is `path`."""

    def torch_dtype(self) -> "torch.dtype":
        """`dtype` as torch names it."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype]


class ColumnsConfig(Section):
    """What a dataset calls the columns that are read; null is our own name."""

    prompt: Text | None = None
    """The prompt, such as `question`."""

    chosen: Text | None = None
    """The better answer."""

    rejected: Text | None = None
    """The worse one."""

    system: Text | None = None
    """Text of a system message, under `data.format: single_turn`; null is none."""

    tools: Text | None = None
    """The tools of a chat."""

    chat_template_kwargs: Text | None = None
    """What the chat template is told besides."""

    def problems(self) -> list[Problem]:
        """Columns that are taken twice, or away from a field that is needed."""
        named = self.model_dump(exclude_none=True)
        found = []
        first: dict[str, str] = {}
        for name, column in named.items():
            if first.setdefault(column, name) != name:
                message = f"is {column}, as {first[column]} is"
                found.append(Problem(name, message, "name each column once"))
            elif column in ("prompt", "chosen", "rejected") and column not in named:
                message = f"is {column}, which leaves none for {column} itself"
                found.append(Problem(name, message, f"say which column the {column} is"))
        return found


class SourceConfig(Section):
    """One file or dataset of preference pairs."""

    path: PathText
    """A jsonl, json, parquet, csv or arrow file, a directory of them, or a hub name."""

    weight: PositiveFloat = 1.0
    """How often each of its pairs is seen in an epoch: 0.5 takes half of them, 2 repeats them."""

    split: Text = "train"
    """The split of a hub dataset; a file has only `train`."""

    subset: Text | None = None
    """The configuration of a hub dataset that has several."""

    format: Format | None = None
    """Instead of `data.format`, for this source."""

    columns: ColumnsConfig = ColumnsConfig()
    """What it calls its columns, where that is not what docs/data.md says: `{prompt: question}`."""


def _as_sources(value: Any) -> Any:
    """`pairs.jsonl`, or a list of such, as what it stands for."""
    values = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(values, (list, tuple)):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in values)


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Preference pairs, and how they become rows."""

    train: Sources
    """A path, a list of paths, or a list of `{path, weight, split, subset, format, columns}`."""

    eval: Sources | None = None
    """Held-out pairs, written like `train`."""

    eval_pairs: PositiveInt | None = None
    """Instead of `eval`: hold out this many pairs of `train`."""

    eval_fraction: Fraction | None = None
    """Instead of `eval`: hold out this share of `train`."""

    row_tokens: PositiveInt = 4096
    """Positions in a row, which is a micro-batch. A pair longer than a row is an error."""

    trim_tokens: Int = 128
    """Rows are cut to a multiple of this: each to what it holds, but with `layout.pipeline` > 1,
    where stages send rows to each other, all rows of a step to what its fullest one holds. 0 keeps
    `row_tokens`. Under `layout.sequence_parallel` it must be a multiple of `layout.tensor`."""

    max_length: PositiveInt | None = 1024
    """Tokens of prompt and answer together, beyond which `truncation` applies; null is no limit."""

    truncation: Literal["keep_start", "drop", "error"] = "keep_start"
    """Cut the answer's end off (it then has no EOS), leave the pair out, or stop."""

    share_prompt: Bool = True
    """Compute a prompt once for both answers."""

    format: Format = "auto"
    """Text, chat messages or Anthropic-HH transcripts; `auto` decides for each record.
    `single_turn`: text that becomes a chat, the prompt a user's message, the answers replies."""

    chat_template: PathText | None = None
    """A Jinja template or a file with one; null is the tokenizer's own."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is no preference pair."""

    bad_rows_file: PathText | None = None
    """With `on_bad_row: skip`: where to list the skipped rows and why; null only counts them."""

    seed: Int = 0
    """Of the order of the pairs and of the choice of held-out ones."""

    num_workers: PositiveInt | None = None
    """Processes that tokenise; null is one per core."""

    cache: PathText | None = None
    """Directory for tokenised pairs; null is the one of Hugging Face `datasets`."""

    @property
    def holds_out(self) -> bool:
        """Whether there are pairs to evaluate on."""
        return bool(self.eval or self.eval_pairs or self.eval_fraction)

    def problems(self) -> list[Problem]:
        """Fields that exclude each other, or that the others leave unread."""
        found = [
            Problem(name, "names no source", "name at least one file or dataset")
            for name in ("train", "eval")
            if getattr(self, name) == ()
        ]
        if self.max_length is not None and self.max_length > self.row_tokens:
            found.append(
                Problem(
                    "max_length",
                    f"is {self.max_length}, longer than a row of {self.row_tokens} tokens",
                    f"set it to at most {self.row_tokens}, or raise data.row_tokens",
                )
            )
        if self.trim_tokens > self.row_tokens:
            found += self._unread(
                "trim_tokens",
                f"a row of {self.row_tokens} tokens is shorter than {self.trim_tokens}",
                f"set it to at most {self.row_tokens}, or to 0 for rows of one length",
            )
        held_out = [n for n in ("eval", "eval_pairs", "eval_fraction") if getattr(self, n)]
        for name in held_out[1:]:
            found += self._unread(name, f"{held_out[0]} says what is held out", "keep one of them")
        if self.max_length is None:
            found += self._unread("truncation", "max_length is null", "set max_length")
        if self.on_bad_row == "error":
            found += self._unread(
                "bad_rows_file", "on_bad_row is error", "set on_bad_row to skip, or leave it out"
            )
        return found


class LayoutConfig(Section):
    """How the model is split over processes; data parallelism is what is left."""

    tensor: PositiveInt = 1
    """Processes that share every weight matrix."""

    pipeline: PositiveInt = 1
    """Pipeline stages, each with some of the layers."""

    virtual_pipeline: PositiveInt = 1
    """Model chunks per stage; more than 1 interleaves them, for a smaller pipeline bubble."""

    context: PositiveInt = 1
    """Processes that share a row's positions; only 1 so far."""

    expert: PositiveInt = 1
    """Processes that share the experts of a mixture-of-experts model."""

    sequence_parallel: Bool = False
    """With `tensor` > 1: split norms and dropouts along the sequence, which saves activations."""

    pipeline_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each of the `pipeline` · `virtual_pipeline` chunks in order; null splits evenly."""

    batch_p2p_comm: Bool = False
    """One batched call for a stage's sends and receives; not with interleaving over 2 stages."""

    def problems(self) -> list[Problem]:
        """What is impossible for any model."""
        section = "layout."
        return [
            Problem(problem.location.removeprefix(section), problem.message, problem.remedy)
            for problem in self.layout().problems()
        ]

    def layout(self) -> Layout:
        """The validated value that the rest of the package works with."""
        return Layout(**{name: getattr(self, name) for name in type(self).model_fields})
