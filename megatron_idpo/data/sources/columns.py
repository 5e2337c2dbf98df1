"""Which columns of a dataset stand for what: `{prompt: question, system: system_prompt}`.

Records come out of here with our names, and with nothing that is not read, so that no other room
knows what a dataset calls its columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_idpo.data.sources.raw_record import FIELDS, PROMPT_LIKE, BadRecord, has_no_prompt

type Columns = Mapping[str, str]
"""From our name, one of `FIELDS` or `system`, to the dataset's."""

AS_OURS: Columns = {}
"""A dataset whose columns have our names."""

_NEEDED = ("prompt", "chosen", "rejected")


def columns_read(columns: Columns, present: Sequence[str]) -> list[str]:
    """Those of a table's columns that are read; the others need not be decoded."""
    wanted = {*FIELDS, *columns.values()}
    if "prompt" not in (*present, *columns):
        wanted |= set(PROMPT_LIKE)
    return [name for name in present if name in wanted]


def renamed(record: object, columns: Columns) -> object:
    """A record with our names; what is no record stays as it is.

    Args:
        record: with the dataset's names.
        columns: which of them stand for what. Those that it does not name go by their own, `system`
            excepted, which is read only where it is named.

    Raises:
        BadRecord: a named column of `prompt`, `chosen` or `rejected` is not there.
    """
    if not isinstance(record, Mapping):
        return record
    named = {*columns, *columns.values()}
    own = (*FIELDS, *PROMPT_LIKE) if has_no_prompt(record) else FIELDS
    found: dict[str, Any] = {
        name: record[name] for name in own if name in record and name not in named
    }
    for name, column in columns.items():
        if record.get(column) is not None:
            found[name] = record[column]
        elif name in _NEEDED:
            message = f"the source's columns say that it has the {name}"
            raise BadRecord(f"field '{column}' is missing", message)
    return found
