"""The prompts that models answer: those of the held-out pairs, or of separate sources.

Records are read as in training (`data/sources/preferences.py`). A record with only a `prompt` is
read as a pair with placeholder answers. Each distinct prompt is used once, in the order of the
data. `prompt_tokens.py` tokenizes prompts.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.run_pairs import load_run_pairs
from megatron_idpo.data.sources.open import OpenSource, open_source
from megatron_idpo.data.sources.preferences import Format, Preference, parse_preference
from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.sources.record import BadRecord, check_prompt_name
from megatron_idpo.data.tokenize.dataset import PairDataset
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

    @staticmethod
    def of(preference: Preference, location: str) -> "PromptRecord":
        """The prompt of a pair."""
        return PromptRecord(
            location, preference.prompt, preference.tools, dict(preference.template_kwargs)
        )


def load_prompts(config: RunConfig, *, has_template: bool) -> tuple[list[PromptRecord], int]:
    """The distinct prompts of `generate.prompts`, or of the held-out pairs.

    Args:
        config: `data` is only needed if `generate.prompts` is not set.
        has_template: whether the tokenizer can render messages.

    Returns:
        The prompts, and the number of rows that `data.on_bad_row: skip` left out.

    Raises:
        ConfigError: a source has a weight.
        DataError: pairs or prompts cannot be read.
    """
    sources = config.generate.prompts
    if sources is None:
        held_out = load_run_pairs(config).eval
        assert held_out is not None, "checked by the verb"
        skipped = held_out.report.skipped_rows
        records = pair_prompts(held_out, format=config.data.format, has_template=has_template)
    else:
        records, skipped = source_prompts(
            sources,
            format=config.data.format if config.has("data") else "auto",
            has_template=has_template,
            skip=config.has("data") and config.data.on_bad_row == "skip",
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


def pair_prompts(pairs: PairDataset, *, format: Format, has_template: bool) -> list[PromptRecord]:
    """The prompt of every pair, read again from the pair's source.

    Args:
        pairs: tokenized pairs, which know their rows.
        format: of the records, where a source sets none; as when the pairs were read.
        has_template: whether the tokenizer can render messages, likewise.

    Raises:
        DataError: a file has changed since the pairs were tokenized.
    """
    origins = [pairs.source_row(index) for index in range(len(pairs))]
    sources = {id(origin.source): origin.source for origin in origins}
    rows: dict[tuple[int, int], set[int]] = {}
    for origin in origins:
        rows.setdefault((id(origin.source), origin.part), set()).add(origin.row)
    records: dict[tuple[int, int, int], PromptRecord] = {}
    for (key, part), part_rows in rows.items():
        source = sources[key]
        for raw in source.parts[part].read():
            if raw.row not in part_rows:
                continue
            location = source.location(part, raw.row)
            try:
                preference = parse_preference(
                    raw.record(), format=source.source.format or format, has_template=has_template
                )
            except BadRecord as error:
                raise _changed_row(location, f"is not a valid pair any more: {error}") from None
            records[key, part, raw.row] = PromptRecord.of(preference, location)
    prompts = []
    for origin in origins:
        record = records.get((id(origin.source), origin.part, origin.row))
        if record is None:
            raise _changed_row(origin.location, "does not exist any more")
        prompts.append(record)
    return prompts


def _changed_row(location: str, message: str) -> DataError:
    remedy = "do not change the data while this runs; start again"
    return DataError.at(
        location, f"{message} (the file has changed since it was tokenized)", remedy
    )


def source_prompts(
    sources: Sequence[SourceConfig], *, format: Format, has_template: bool, skip: bool
) -> tuple[list[PromptRecord], int]:
    """The prompts of sources of pairs, or of records with only a `prompt`.

    Args:
        sources: must not have weights, because each prompt is answered once.
        format: of the records, where a source sets none. With `chat`, a text `prompt` without
            answers is a user message.
        has_template: whether the tokenizer can render messages.
        skip: whether invalid rows are skipped.

    Returns:
        The prompts, and the number of skipped rows.

    Raises:
        ConfigError: a source has a weight.
        DataError: a source cannot be read, rows are invalid (the first ten are listed), or no
            prompt is left.
    """
    if weighted := [source.path for source in sources if source.weight != 1]:
        message = f"{weighted[0]} has a weight, but each prompt is answered once"
        raise ConfigError.at("generate.prompts", message, "leave the weight out")
    records: list[PromptRecord] = []
    problems: list[Problem] = []
    for opened in [open_source(source) for source in sources]:
        record_format = opened.source.format or format
        for location, raw in _rows(opened):
            try:
                pair = parse_preference(
                    _as_pair(raw.record(), record_format),
                    format=record_format,
                    has_template=has_template,
                )
            except BadRecord as error:
                problems.append(Problem(location, error.reason, error.remedy))
                if len(problems) == _MAX_PROBLEMS and not skip:
                    raise DataError.of(problems) from None
            else:
                records.append(PromptRecord.of(pair, location))
    if problems and (not skip or not records):
        raise DataError.of(problems[:_MAX_PROBLEMS])
    if not records:
        raise DataError.at("generate.prompts", "the sources have no records", "name other sources")
    return records, len(problems)


def _rows(source: OpenSource) -> Iterator[tuple[str, RawRow]]:
    """Every row of a source with its location."""
    for index, part in enumerate(source.parts):
        for raw in part.read():
            yield source.location(index, raw.row), raw


def _as_pair(record: object, format: Format) -> object:
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
        check_prompt_name(record)
    if not prompt:
        reason = "field 'prompt' is missing" if prompt is None else "'prompt' is empty"
        raise BadRecord(reason, "give a prompt, or chosen and rejected that share one")
    if isinstance(prompt, str) and format == "chat":
        prompt = [{"role": "user", "content": prompt}]
    answers: list[Any] = ["a", "b"]
    if not isinstance(prompt, str):
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    return {**record, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
