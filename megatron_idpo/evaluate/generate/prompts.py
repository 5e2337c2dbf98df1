"""The prompts that models answer: those of the held-out pairs, or of sources of their own.

A record is read as training reads it (`data/preferences.py`), so a prompt is the text or the
messages that a pair's answers follow; a record with a `prompt` alone is taken as a pair whose
answers nobody has written yet. Each different prompt is taken once, in the data's order. Tokens are
`prompt_tokens.py`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sections import SourceConfig
from megatron_idpo.data.run_pairs import load_run_pairs, source_of
from megatron_idpo.data.sources.open import OpenSource, open_source
from megatron_idpo.data.sources.preferences import Format, Preference, parse_preference
from megatron_idpo.data.sources.raw_record import BadRecord, refuse_other_prompt
from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.tokenize.build_store import location
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.generate.answers import Prompt

_PROBLEMS_TOLD = 10


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt, as people read it."""

    location: str
    """Where it was read, as `file:row`."""

    prompt: Prompt
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for the same prompt, wherever it was read."""
        return json.dumps([self.prompt, self.tools, self.template_kwargs], sort_keys=True)

    @staticmethod
    def of(preference: Preference, location: str) -> "PromptRecord":
        """The prompt of a pair."""
        return PromptRecord(
            location, preference.prompt, preference.tools, dict(preference.template_kwargs)
        )


def load_prompts(config: RunConfig, *, has_template: bool) -> tuple[list[PromptRecord], int]:
    """The prompts of `generate.prompts`, or of the held-out pairs, each different one once.

    Args:
        config: `data` may be absent where `generate.prompts` is given.
        has_template: whether the tokenizer can render messages.

    Returns:
        The prompts, and how many rows `data.on_bad_row: skip` has left out.

    Raises:
        ConfigError: a source has a weight.
        DataError: as reading pairs; or a record without a prompt.
    """
    sources = config.generate.prompts
    if sources is None:
        held_out = load_run_pairs(config).eval
        assert held_out is not None, "checked by the verb"
        skipped = held_out.report.skipped_rows
        found = pair_prompts(held_out, format=config.data.format, has_template=has_template)
    else:
        format = config.data.format if config.has("data") else "auto"
        skip = config.has("data") and config.data.on_bad_row == "skip"
        found, skipped = source_prompts(
            sources, format=format, has_template=has_template, skip=skip
        )
    different: dict[str, PromptRecord] = {}
    for record in found:
        different.setdefault(record.key, record)
    wanted = config.generate.max_prompts
    return choose(list(different.values()), wanted, seed=config.evaluate.seed), skipped


def choose(records: Sequence[PromptRecord], wanted: int | None, *, seed: int) -> list[PromptRecord]:
    """At most `wanted` of the prompts, in their order.

    They are those with the lowest keyed hashes, so that the choice depends on the seed and on the
    prompts alone, and prompts that are added later leave it nearly as it is.
    """
    if wanted is None or wanted >= len(records):
        return list(records)
    key = str(seed).encode()

    def digest(at: int) -> bytes:
        return hashlib.blake2b(records[at].key.encode(), digest_size=16, key=key).digest()

    return [records[at] for at in sorted(sorted(range(len(records)), key=digest)[:wanted])]


def pair_prompts(pairs: PairDataset, *, format: Format, has_template: bool) -> list[PromptRecord]:
    """The prompt of every pair, read again from where the pair was read.

    Args:
        pairs: tokenised ones, which know their rows.
        format: with which they were read, where their source has none of its own.
        has_template: likewise.

    Raises:
        DataError: a file has changed since.
    """
    origins = [pairs.origin(index) for index in range(len(pairs))]
    wanted: dict[tuple[int, int], set[int]] = {}
    for origin in origins:
        wanted.setdefault((id(origin.found), origin.part), set()).add(origin.row)
    found_by_id = {id(origin.found): origin.found for origin in origins}
    read: dict[tuple[int, int, int], PromptRecord] = {}
    for (source, part), rows in wanted.items():
        found = found_by_id[source]
        for raw in found.parts[part].read():
            if raw.row not in rows:
                continue
            where = location(found, part, raw.row)
            try:
                record = raw.record()
                preference = parse_preference(
                    record, format=found.source.format or format, has_template=has_template
                )
            except BadRecord as error:
                message = f"was a pair when the data was tokenised, and is none now: {error}"
                raise DataError.at(
                    where, message, "leave the data as it is, and start again"
                ) from None
            read[source, part, raw.row] = PromptRecord.of(preference, where)
    try:
        return [read[id(origin.found), origin.part, origin.row] for origin in origins]
    except KeyError as error:
        source, part, row = error.args[0]
        message = "was a row when the data was tokenised, and is none now"
        where = location(found_by_id[source], part, row)
        raise DataError.at(where, message, "leave the data as it is, and start again") from None


def source_prompts(
    sources: Sequence[SourceConfig], *, format: Format, has_template: bool, skip: bool
) -> tuple[list[PromptRecord], int]:
    """The prompts of pairs, or of records with a `prompt` alone, and how many rows were skipped.

    Args:
        sources: where they are; a weight means nothing here and is refused.
        format: what the records are, where a source does not say it. Under `chat` a `prompt` that
            is text, alone in its record, is a user's message.
        has_template: whether the tokenizer can render messages.
        skip: leave rows out that are neither.

    Raises:
        ConfigError: a source has a weight.
        DataError: a source cannot be read, a row is neither (the first ten are told), or none is
            left.
    """
    if weighted := [source.path for source in sources if source.weight != 1]:
        message = f"the weight of {weighted[0]} would not be read: each prompt is answered once"
        raise ConfigError.at("generate.prompts", message, "leave it out")
    found: list[PromptRecord] = []
    problems: list[Problem] = []
    for opened in [open_source(source_of(source)) for source in sources]:
        for where, raw in _rows(opened):
            try:
                mine = opened.source.format or format
                pair = parse_preference(
                    _as_pair(raw.record(), mine), format=mine, has_template=has_template
                )
            except BadRecord as error:
                problems.append(Problem(where, error.reason, error.remedy))
                if len(problems) == _PROBLEMS_TOLD and not skip:
                    raise DataError.of(problems) from None
                continue
            found.append(PromptRecord.of(pair, where))
    if problems and (not skip or not found):
        raise DataError.of(problems[:_PROBLEMS_TOLD])
    if not found:
        raise DataError.at("generate.prompts", "the sources hold no records", "name others")
    return found, len(problems)


def _rows(found: OpenSource) -> Iterator[tuple[str, RawRow]]:
    """Every row of a source with its place."""
    for number, part in enumerate(found.parts):
        for raw in part.read():
            yield location(found, number, raw.row), raw


def _as_pair(record: object, format: Format) -> object:
    """A record with a prompt alone as a pair with made-up answers, so that all rules of pairs hold.

    Raises:
        BadRecord: there is no prompt either.
    """
    if not isinstance(record, Mapping) or not _is_alone(record):
        return record
    prompt = record.get("prompt")
    if prompt is None:
        refuse_other_prompt(record)
    if not prompt:
        reason = "field 'prompt' is missing" if prompt is None else "'prompt' is empty"
        raise BadRecord(reason, "give a prompt, or chosen and rejected that share one")
    if isinstance(prompt, str) and format == "chat":
        prompt = [{"role": "user", "content": prompt}]
    answers: list[Any] = ["a", "b"]
    if not isinstance(prompt, str):
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    return {**record, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def _is_alone(record: Mapping[str, Any]) -> bool:
    """Whether there is no answer beside the prompt."""
    return record.get("chosen") is None and record.get("rejected") is None
