"""A record of a preference dataset before it is understood: what is read of it, and why it is none.

What it has to be is `preferences.py`.
"""

from collections.abc import Mapping
from typing import Any

type Message = dict[str, Any]
"""`role`, `content` and what the template may read besides (`tool_calls`, `name`, ...)."""

FIELDS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
"""The columns that are read; all others are ignored."""

PROMPT_LIKE = ("question", "instruction", "query", "input")
"""What other datasets call a prompt; with one of these, a record is hardly meant to have none."""


class BadRecord(Exception):
    """Why a record is not a preference pair. The reader adds file and row."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        """Args: the reason, for the user; what to do about it."""
        super().__init__(reason, remedy)  # Both are arguments, so that pickling keeps both.
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        """The reason."""
        return self.reason


def has_no_prompt(record: Mapping[str, Any]) -> bool:
    """Whether there is none, or a blank one."""
    return not _says_something(record.get("prompt"))


def refuse_other_prompt(record: Mapping[str, Any], *, else_: str = "") -> None:
    """Refuse to take a record for one without a prompt that has it under another name.

    Args:
        record: without a prompt.
        else_: what else than naming it would do.

    Raises:
        BadRecord: it does.
    """
    found = [name for name in PROMPT_LIKE if _says_something(record.get(name))]
    if not found:
        return
    remedy = f"give the source `columns: {{prompt: {found[0]}}}`"
    if len(found) > 1:
        remedy = "write them into one column `prompt`"
    named = " and ".join(f"'{name}'" for name in found)
    raise BadRecord(f"there is no field 'prompt', but {named}", remedy + else_)


def _says_something(value: object) -> bool:
    """Text that is not blank, or messages."""
    return bool(value.strip() if isinstance(value, str) else isinstance(value, list) and value)


def kind_name(value: object) -> str:
    """What to call a value of the wrong type."""
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"{value!r:.40}")
