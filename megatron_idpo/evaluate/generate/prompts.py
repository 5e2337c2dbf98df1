"""The prompts that models answer: those of the held-out pairs, or of separate sources.

Records are read as in training (`data/sources/preferences.py`). A record with only a `prompt` is
read as a pair with placeholder answers. Each distinct prompt is used once, in the order of the
data. `prompt_tokens.py` tokenizes prompts.
"""

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.run_pairs import load_run_pairs
from megatron_idpo.data.sources.open import OpenSource, open_source
from megatron_idpo.data.sources.preferences import Format, parse_preference
from megatron_idpo.data.sources.record import PROMPT_LIKE, BadRecord, check_prompt_name
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.generate.answers import Prompt

_MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt before the chat template is applied."""

    location: str
    """Where it was read, as `file:row`."""

    prompt: Prompt
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal prompts, wherever they were read."""
        return json.dumps([self.prompt, self.tools, self.template_kwargs], sort_keys=True)


def load_prompts(config: RunConfig, *, has_template: bool) -> tuple[list[PromptRecord], int]:
    """The distinct prompts of `generate.prompts`, or of the held-out pairs.

    Args:
        config: `data` is only needed if `generate.prompts` is not set.
        has_template: whether the tokenizer can render messages.

    Returns:
        The prompts, and the number of rows that `data.on_bad_row: skip` left out.

    Raises:
        ConfigError: a source has a weight, but each prompt is answered once.
        DataError: pairs or prompts cannot be read.
    """
    locations: set[str] | None = None
    if config.generate.prompts is None:
        held_out = load_run_pairs(config).eval
        assert held_out is not None, "checked by the verb"
        locations = {held_out.location(index) for index in range(len(held_out))}
        sources = held_out.sources
    else:
        if weighted := [source.path for source in config.generate.prompts if source.weight != 1]:
            message = f"{weighted[0]} has a weight, but each prompt is answered once"
            raise ConfigError.at("generate.prompts", message, "leave the weight out")
        sources = [open_source(source) for source in config.generate.prompts]
    records, skipped = source_prompts(
        sources,
        format=config.data.format if config.has("data") else "auto",
        has_template=has_template,
        skip=config.has("data") and config.data.on_bad_row == "skip",
        locations=locations,
    )
    distinct: dict[str, PromptRecord] = {}
    for record in records:
        distinct.setdefault(record.key, record)
    limit = config.generate.max_prompts
    return choose(list(distinct.values()), limit, seed=config.evaluate.seed), skipped


def choose(records: Sequence[PromptRecord], limit: int | None, *, seed: int) -> list[PromptRecord]:
    """At most `limit` of the prompts, in their order.

    Takes those with the lowest keyed hashes. The choice depends only on the seed and the prompts,
    and prompts that are added later change it little.
    """
    if limit is None or limit >= len(records):
        return list(records)
    key = str(seed).encode()

    def digest(index: int) -> bytes:
        return hashlib.blake2b(records[index].key.encode(), digest_size=16, key=key).digest()

    chosen = sorted(range(len(records)), key=digest)[:limit]
    return [records[index] for index in sorted(chosen)]


def source_prompts(
    sources: Sequence[OpenSource],
    *,
    format: Format,
    has_template: bool,
    skip: bool = False,
    locations: Container[str] | None = None,
) -> tuple[list[PromptRecord], int]:
    """The prompts of pairs, or of records with only a `prompt`.

    Args:
        sources: are read in order.
        format: of the records, where a source sets none.
        has_template: whether the tokenizer can render messages.
        skip: whether invalid rows are skipped.
        locations: of the rows to read; None: all.

    Returns:
        The prompts, and the number of skipped rows.

    Raises:
        DataError: a source cannot be read, rows are invalid (the first ten are listed), or no
            prompt is left.
    """
    records: list[PromptRecord] = []
    problems: list[Problem] = []
    for opened in sources:
        format_ = opened.source.format or format
        for index, part in enumerate(opened.parts):
            for raw in part.read():
                location = opened.location(index, raw.row)
                if locations is not None and location not in locations:
                    continue
                try:
                    record = _as_pair(raw.record())
                    pair = parse_preference(record, format=format_, has_template=has_template)
                except BadRecord as error:
                    problems.append(Problem(location, error.reason, error.remedy))
                    continue
                kwargs = dict(pair.template_kwargs)
                records.append(PromptRecord(location, pair.prompt, pair.tools, kwargs))
    if problems and (not skip or not records):
        raise DataError.of(problems[:_MAX_PROBLEMS])
    if not records:
        raise DataError.at("generate.prompts", "the sources have no records", "name other sources")
    return records, len(problems)


def _as_pair(record: object) -> object:
    """Adds placeholder answers to a record with only a prompt, so that the rules of pairs apply.

    Raises:
        BadRecord: it has no prompt.
    """
    if not isinstance(record, Mapping):
        return record
    if record.get("chosen") is not None or record.get("rejected") is not None:
        return record
    prompt = record.get("prompt")
    if prompt is None:
        check_prompt_name(record, PROMPT_LIKE)
    if not prompt:
        reason = "field 'prompt' is missing" if prompt is None else "'prompt' is empty"
        raise BadRecord(reason, "give a prompt, or chosen and rejected that share one")
    answers: list[Any] = ["a", "b"]
    if not isinstance(prompt, str):
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    return {**record, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
