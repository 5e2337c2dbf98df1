"""A raw record of a preference dataset: its fields, its column names, why it is not a pair.

`rename_columns` gives records the field names below, so that no other module needs a dataset's own
column names; `shapes.py` knows those of published shapes. Columns that are not part of the
conversation are dropped. `preferences.py` decides what a record must contain.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_idpo.data.sources.shapes import (
    ALPACA_FIELDS,
    REQUIRED,
    SHAPE_FIELDS,
    is_about_it,
    is_conversation_field,
    standard_fields,
)

type Message = dict[str, Any]
"""`role`, `content` and other fields that the template may read (`tool_calls`, `name`, ...)."""

type Columns = Mapping[str, str]
"""From our name, one of `FIELDS`, to the dataset's column: `{prompt: question}`."""

STANDARD_COLUMNS: Columns = {}
"""The columns have our names."""

FIELDS = (*REQUIRED, "system", "history", "tools", "chat_template_kwargs")
"""The fields that are read."""

PROMPT_LIKE = ("question", "instruction", "query", "input")
"""Other datasets' names of the prompt; a record with one of these hardly has an implicit prompt."""


class BadRecord(Exception):
    """Why a record is not a preference pair. The reader adds file and row."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        """Args: the reason, for the user; the remedy."""
        super().__init__(reason, remedy)  # Both are arguments, so that pickling keeps both.
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        """The reason."""
        return self.reason


class JsonDecoder(json.JSONDecoder):
    """Decodes JSON, and keeps the names that an object has twice: the last value would win."""

    def __init__(self) -> None:
        """Nothing is decoded yet."""
        self.doubled: list[str] = []
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self.doubled += [name for name in made if names.count(name) > 1]
        return made

    def check(self) -> None:
        """Check the record that was decoded last.

        Raises:
            BadRecord: it has a name twice.
        """
        if doubled := self.doubled:
            self.doubled = []
            raise BadRecord(f"the key '{doubled[0]}' occurs twice", "remove one of the two")


def parse_json(text: bytes) -> object:
    """The JSON value of a row.

    Raises:
        BadRecord: it is not UTF-8 or not JSON, or an object has a key twice.
    """
    decoder = JsonDecoder()
    try:
        record = decoder.decode(text.decode("utf-8"))
        decoder.check()
        return record
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start + 1} of the row") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None


def needed_columns(columns: Columns, schema: Any) -> list[str]:
    """The columns of a `pyarrow.Schema` that are read; the others need not be decoded.

    Columns that only may belong to the conversation are left out if they are binary: images. If
    none can be the prompt, all texts may belong to it.
    """
    named = {*FIELDS, *columns.values()}
    prompts = {columns.get("prompt", "prompt"), *SHAPE_FIELDS} - {"chosen", "rejected"}
    is_implicit = not prompts & {*schema.names}

    def is_needed(name: str, type_: str) -> bool:
        may_belong = name in SHAPE_FIELDS or is_conversation_field(name)
        may_belong |= is_implicit and "string" in type_ and not is_about_it(name)
        return name in named or (may_belong and "binary" not in type_)

    return [field.name for field in schema if is_needed(field.name, str(field.type))]


def rename_columns(record: object, columns: Columns) -> object:
    """The record with our field names; a value that is not a mapping is returned unchanged.

    Args:
        record: with the dataset's names.
        columns: our names of its columns. An unmapped field keeps its name, unless the record has
            one of the shapes in `shapes.py`.

    Returns:
        `FIELDS`, and the fields that look like a part of the conversation too; without a prompt,
        all texts.

    Raises:
        BadRecord: a mapped column of `prompt`, `chosen` or `rejected` is missing.
    """
    if not isinstance(record, Mapping):
        return record
    mapped = {*columns, *columns.values()}
    fields = {name: value for name, value in record.items() if name not in mapped}
    for name, column in columns.items():
        if record.get(column) is not None:
            fields[name] = record[column]
        elif name in REQUIRED:
            remedy = f"data's columns map {name} to it: correct the mapping or the record"
            raise BadRecord(f"field '{column}' is missing", remedy)
    named = [column for column in columns.values() if column in ALPACA_FIELDS]
    if named and named == [columns.get("prompt")]:
        parts = [part for part in map(record.get, ALPACA_FIELDS) if isinstance(part, str)]
        if len(parts) == len(ALPACA_FIELDS) and all(map(str.strip, parts)):
            # Kept under their own names too, so that joining them is reported.
            fields |= {"prompt": "\n".join(parts), **dict(zip(ALPACA_FIELDS, parts, strict=True))}
    fields = standard_fields(fields)
    # Without a prompt, any text may be it.
    is_implicit = not has_prompt(fields)
    return {
        name: value
        for name, value in fields.items()
        if name in FIELDS
        or (value is not None and is_conversation_field(name))
        or (is_implicit and isinstance(value, str))
    }


def has_prompt(record: Mapping[str, Any], name: str = "prompt") -> bool:
    """Whether the field has messages or text that is not blank."""
    value = record.get(name)
    return bool(value.strip() if isinstance(value, str) else isinstance(value, list) and value)


def check_prompt_name(record: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a record without a prompt that has a field with another usual name for it.

    Args:
        record: without a prompt.
        names: the usual names, or those that may be one.

    Raises:
        BadRecord: naming the fields.
    """
    names = [name for name in names if name not in FIELDS and has_prompt(record, name)]
    if not names:
        return
    remedy = f"give the source `columns: {{prompt: {names[0]}}}`"
    if set(names) == set(ALPACA_FIELDS):
        remedy += ", which joins both"
    elif len(names) > 1:
        remedy = "map the one that is the prompt with `columns`, or write them into one column"
    listed = " and ".join(f"'{name}'" for name in names)
    remedy += "; the format 'text' trains answers without a prompt"
    raise BadRecord(f"there is no field 'prompt', but {listed}", remedy)


def type_name(value: object) -> str:
    """The name of a value's JSON type, for messages."""
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"{value!r:.40}")
