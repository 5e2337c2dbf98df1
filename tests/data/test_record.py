"""What is said of records before they are understood."""

import pickle
from typing import Any

import pytest

from megatron_idpo.data.sources.raw_record import (
    PROMPT_LIKE,
    BadRecord,
    has_no_prompt,
    kind_name,
    refuse_other_prompt,
)


@pytest.mark.parametrize("name", PROMPT_LIKE)
def test_a_prompt_of_another_name_is_reported(name: str) -> None:
    with pytest.raises(BadRecord, match=f"no field 'prompt', but '{name}'") as message:
        refuse_other_prompt({"chosen": "a", name: "What?"})
    assert f"columns: {{prompt: {name}}}" in message.value.remedy


def test_a_prompt_in_parts_is_not_taken_by_half() -> None:
    record = {"instruction": "Translate.", "input": "Good morning", "query": " "}
    with pytest.raises(BadRecord, match="but 'instruction' and 'input'") as message:
        refuse_other_prompt(record, else_="; or not")
    assert message.value.remedy == "write them into one column `prompt`; or not"


def test_messages_are_a_prompt() -> None:
    with pytest.raises(BadRecord, match="but 'question'"):
        refuse_other_prompt({"question": [{"role": "user", "content": "What?"}]})


@pytest.mark.parametrize(
    ("prompt", "is_none"), [(None, True), (" ", True), ([], True), ("x", False), ([{}], False)]
)
def test_a_blank_prompt_is_none(prompt: Any, is_none: bool) -> None:
    assert has_no_prompt({"prompt": prompt}) == is_none and has_no_prompt({})


@pytest.mark.parametrize("value", ["", " ", None, 3, []])
def test_what_is_no_text_is_no_prompt(value: Any) -> None:
    refuse_other_prompt({"chosen": "a", "question": value})


def test_a_reason_comes_through_other_processes() -> None:
    error = pickle.loads(pickle.dumps(BadRecord("reason", "remedy")))
    assert (error.reason, error.remedy, str(error)) == ("reason", "remedy", "reason")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("x", "text"),
        ([], "a list"),
        ({}, "an object"),
        (True, "a boolean"),
        (None, "null"),
        (3, "3"),
    ],
)
def test_kinds_have_names(value: Any, name: str) -> None:
    assert kind_name(value) == name
