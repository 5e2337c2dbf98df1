"""The sections `model` and `data`: the model to start from and the pairs to train on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from megatron_idpo.config.section import (
    Bool,
    Fraction,
    FromPath,
    Int,
    NonEmpty,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    TemplateText,
    Text,
)
from megatron_idpo.errors import Problem

if TYPE_CHECKING:
    import torch

Format = Literal["auto", "text", "chat", "hh", "single_turn"]
"""What the records of a dataset are (`data/sources/preferences.py`)."""


class ModelConfig(Section):
    """The model to start from."""

    path: PathText
    """A Hugging Face directory, a hub name, or a `torch_dist` checkpoint that we wrote."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """The dtype of weights and computation, independent of that of the checkpoint."""

    tokenizer: PathText | None = None
    """Directory or hub name of the tokenizer, or a sentencepiece `.model` file; null is `path`."""

    def torch_dtype(self) -> "torch.dtype":
        """`dtype` as torch names it."""
        return torch_dtype(self.dtype)


def torch_dtype(name: str) -> "torch.dtype":
    """`bf16`, `fp16` or `fp32` as torch names it."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


class ColumnsConfig(Section):
    """The names of the columns that are read; null is the standard name."""

    prompt: Text | None = None
    """The prompt, such as `question`."""

    chosen: Text | None = None
    """The better answer."""

    rejected: Text | None = None
    """The worse answer."""

    system: Text | None = None
    """The text of a chat's system message; null is `system`."""

    tools: Text | None = None
    """The tools of a chat."""

    chat_template_kwargs: Text | None = None
    """Further arguments of the chat template."""

    def problems(self) -> Iterator[Problem]:
        """A column that two fields name, or that a required field needs."""
        fields: dict[str, str] = {}
        columns = self.model_dump(exclude_none=True)
        for name, column in columns.items():
            if fields.setdefault(column, name) != name:
                yield Problem(name, f"is {column}, as {fields[column]} is", "name each column once")
            elif column in {"prompt", "chosen", "rejected"} - columns.keys():
                message = f"takes the column {column}, which the field {column} needs"
                yield Problem(name, message, f"set columns.{column}")


class SourceConfig(Section):
    """One file or dataset of preference pairs."""

    path: PathText
    """A jsonl, json, csv, tsv, parquet or arrow file, a directory or pattern, or a hub name."""

    weight: Annotated[PositiveFloat, Field(le=1000)] = 1.0
    """How often each of its pairs is seen in an epoch: 0.5 takes half of them, 2 repeats them;
    at most 1000."""

    split: Text | None = None
    """The split to read. Null is `train` of a hub dataset; files of several splits need one."""

    subset: Text | None = None
    """The configuration of a hub dataset, or of a clone of one, that has several."""

    format: Format | None = None
    """Replaces `data.format` for this source."""

    columns: ColumnsConfig = ColumnsConfig()
    """Column names that differ from the standard ones in docs/data.md: `{prompt: question}`."""

    @property
    def has_columns(self) -> bool:
        """Whether it names columns."""
        return self.columns != ColumnsConfig()


Sources = Annotated[
    tuple[Annotated[SourceConfig, FromPath], ...],
    NonEmpty,
    BeforeValidator(lambda value: [value] if isinstance(value, str | dict) else value),
    WithJsonSchema({"type": "path, source, or list of them"}),
]


class DataConfig(Section):
    """Preference pairs, and how they are tokenized and packed into rows."""

    train: Sources
    """A path, a list of paths, or a list of `{path, weight, split, subset, format, columns}`."""

    eval: Sources | None = None
    """Held-out pairs, written like `train`."""

    eval_pairs: PositiveInt | None = None
    """Instead of `eval`: hold out this many pairs of `train`."""

    eval_fraction: Fraction | None = None
    """Instead of `eval`: hold out this share of `train`."""

    row_tokens: PositiveInt = 4096
    """Tokens in a row, which is a micro-batch. A pair longer than a row is an error."""

    trim_tokens: Int = 128
    """Rows are trimmed to a multiple of this; on a GPU, where attention is compiled for each
    length, to at most four lengths that are multiples of it. With `layout.pipeline` > 1, where
    stages send rows to each other, all rows of a step get the length of the fullest one. 0 keeps
    `row_tokens`. Both must be multiples of `layout.context`, with `layout.sequence_parallel` of
    `layout.context` times `layout.tensor`."""

    max_length: PositiveInt | None = 1024
    """Tokens of prompt and answer, above which `truncation` applies; null is no limit."""

    truncation: Literal["keep_start", "drop", "error"] = "keep_start"
    """Cut off the end of the answer (it then has no EOS), drop the pair, or stop."""

    share_prompt: Bool = True
    """Compute a prompt once for both answers."""

    format: Format = "auto"
    """Text, chat messages or Anthropic-HH transcripts; `auto` decides for each record.
    `single_turn`: text that becomes a chat: the prompt is the user's message, the answers are
    replies."""

    columns: ColumnsConfig = ColumnsConfig()
    """Column names, for every source without its own `columns`: `{prompt: question}`."""

    chat_template: TemplateText | None = None
    """A Jinja template or a file with one; null is the tokenizer's own."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is not a preference pair."""

    bad_rows_file: PathText | None = None
    """With `on_bad_row: skip`: a file to list the skipped rows and why; null only counts them."""

    seed: Int = 0
    """Seed of the order of the pairs and of the choice of held-out pairs."""

    num_workers: Annotated[PositiveInt, Field(le=1024)] | None = None
    """Processes that tokenize, at most 1024; null is one per core."""

    cache: PathText | None = None
    """Directory for tokenized pairs; null is the cache of Hugging Face `datasets`."""

    @property
    def holds_out(self) -> bool:
        """Whether there are pairs to evaluate on."""
        return bool(self.eval or self.eval_pairs or self.eval_fraction)

    used_with: ClassVar = {"truncation": ("max_length",), "bad_rows_file": ("on_bad_row", "skip")}
    exclusive: ClassVar = ("eval", "eval_pairs", "eval_fraction")

    def problems(self) -> Iterator[Problem]:
        """Lengths that do not fit into a row."""
        row = self.row_tokens
        if self.max_length is not None and self.max_length > row:
            message = f"is {self.max_length}, longer than a row of {row} tokens"
            yield Problem("max_length", message, f"set it to at most {row}, or raise row_tokens")
        if self.trim_tokens > row and self._is_set("trim_tokens"):
            message = f"is {self.trim_tokens}, which has no effect on rows of {row} tokens"
            remedy = f"set it to at most {row}, or to 0 for rows of equal length"
            yield Problem("trim_tokens", message, remedy)
