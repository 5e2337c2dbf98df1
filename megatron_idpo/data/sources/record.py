"""A raw record of a preference dataset: its fields, its column names, why it is not a pair.

`rename_columns` gives records the field names below and drops all other columns, so that no other
module needs a dataset's own column names. `preferences.py` decides what a record must contain.
"""

from collections.abc import Mapping, Sequence
from typing import Any

type Message = dict[str, Any]
"""`role`, `content` and other fields that the template may read (`tool_calls`, `name`, ...)."""

type Columns = Mapping[str, str]
"""From our name, one of `FIELDS` or `system`, to the dataset's column: `{prompt: question}`."""

STANDARD_COLUMNS: Columns = {}
"""The columns have our names."""

FIELDS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
"""The fields that are read; other columns are ignored. `system` is read only if mapped."""

PROMPT_LIKE = ("question", "instruction", "query", "input")
"""Other datasets' names of the prompt; a record with one of these hardly has an implicit prompt."""

_REQUIRED = ("prompt", "chosen", "rejected")


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


def needed_columns(columns: Columns, present: Sequence[str]) -> list[str]:
    """The columns of a table that are read; the others need not be decoded."""
    needed = {*FIELDS, *columns.values()}
    if "prompt" not in (*present, *columns):
        needed |= set(PROMPT_LIKE)
    return [name for name in present if name in needed]


def rename_columns(record: object, columns: Columns) -> object:
    """The record with our field names; a value that is not a mapping is returned unchanged.

    Args:
        record: with the dataset's names.
        columns: our names of its columns. An unmapped field keeps its name, except for `system`,
            which is read only if mapped.

    Raises:
        BadRecord: a mapped column of `prompt`, `chosen` or `rejected` is missing.
    """
    if not isinstance(record, Mapping):
        return record
    mapped = {*columns, *columns.values()}
    own_names = FIELDS if has_prompt(record) else (*FIELDS, *PROMPT_LIKE)
    fields = {name: record[name] for name in own_names if name in record and name not in mapped}
    for name, column in columns.items():
        if record.get(column) is not None:
            fields[name] = record[column]
        elif name in _REQUIRED:
            remedy = f"data's columns map {name} to it: correct the mapping or the record"
            raise BadRecord(f"field '{column}' is missing", remedy)
    return fields


def has_prompt(record: Mapping[str, Any], name: str = "prompt") -> bool:
    """Whether the field has messages or text that is not blank."""
    value = record.get(name)
    return bool(value.strip() if isinstance(value, str) else isinstance(value, list) and value)


def check_prompt_name(record: Mapping[str, Any], *, alternative: str = "") -> None:
    """Refuse a record without a prompt that has a field with another usual name for it.

    Args:
        record: without a prompt.
        alternative: added to the remedy.

    Raises:
        BadRecord: naming the fields.
    """
    names = [name for name in PROMPT_LIKE if has_prompt(record, name)]
    if not names:
        return
    remedy = f"give the source `columns: {{prompt: {names[0]}}}`"
    if len(names) > 1:
        remedy = "write them into one column `prompt`"
    listed = " and ".join(f"'{name}'" for name in names)
    raise BadRecord(f"there is no field 'prompt', but {listed}", remedy + alternative)


def type_name(value: object) -> str:
    """The name of a value's JSON type, for messages."""
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"{value!r:.40}")
