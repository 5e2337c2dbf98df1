"""Raw records: column names, prompts under other names, names of types."""

import pickle
from typing import Any

import pyarrow as pa
import pytest

from megatron_idpo.data.sources.record import (
    PROMPT_LIKE,
    BadRecord,
    check_prompt_name,
    has_prompt,
    needed_columns,
    rename_columns,
    type_name,
)


@pytest.mark.parametrize("name", PROMPT_LIKE)
def test_prompt_under_another_name_is_reported(name: str) -> None:
    with pytest.raises(BadRecord, match=f"no field 'prompt', but '{name}'") as message:
        check_prompt_name({"chosen": "a", name: "What?"}, PROMPT_LIKE)
    assert f"columns: {{prompt: {name}}}" in message.value.remedy


def test_prompt_in_two_fields_is_reported() -> None:
    record = {"instruction": "Translate.", "input": "Good morning", "query": " "}
    with pytest.raises(BadRecord, match="but 'instruction' and 'input'") as message:
        check_prompt_name(record, PROMPT_LIKE)
    assert "columns: {prompt: instruction}`, which joins both" in message.value.remedy
    with pytest.raises(BadRecord, match="but 'question' and 'input'") as message:
        check_prompt_name({"question": "q", "input": "i"}, PROMPT_LIKE)
    assert "map the one that is the prompt" in message.value.remedy


def test_messages_under_another_name_are_reported() -> None:
    with pytest.raises(BadRecord, match="but 'question'"):
        check_prompt_name({"question": [{"role": "user", "content": "What?"}]}, PROMPT_LIKE)


@pytest.mark.parametrize(
    ("prompt", "expected"), [(None, False), (" ", False), ([], False), ("x", True), ([{}], True)]
)
def test_blank_prompt_counts_as_missing(prompt: Any, expected: bool) -> None:
    assert has_prompt({"prompt": prompt}) == expected and not has_prompt({})


@pytest.mark.parametrize("value", ["", " ", None, 3, []])
def test_blank_or_invalid_fields_are_not_taken_for_a_prompt(value: Any) -> None:
    check_prompt_name({"chosen": "a", "question": value}, PROMPT_LIKE)


def test_bad_record_can_be_pickled() -> None:
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
def test_type_names(value: Any, name: str) -> None:
    assert type_name(value) == name


TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_only_needed_fields_are_kept() -> None:
    read = {**TEXT, "system": "s", "tools": []}
    assert rename_columns({**read, "score": 1, "prompt_id": "x", "notes": "y"}, {}) == read
    columns = {**TEXT, "query": "x"}
    assert rename_columns(columns, {}) == columns, "kept, so that it can be reported"
    assert rename_columns({**TEXT, "query": "x"}, {"prompt": "query"}) == {**TEXT, "prompt": "x"}
    assert rename_columns(["not", "a", "record"], {"prompt": "query"}) == ["not", "a", "record"]


def test_mapped_column_loses_its_own_name() -> None:
    assert rename_columns(TEXT, {"chosen": "rejected"}) == {"prompt": "q", "chosen": "b"}


def test_columns_can_be_swapped() -> None:
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert rename_columns(TEXT, swapped) == {**TEXT, "chosen": "b", "rejected": "a"}


@pytest.mark.parametrize("record", [{"chosen": "a", "rejected": "b"}, {**TEXT, "query": None}])
def test_missing_mapped_column_is_reported(record: dict[str, str | None]) -> None:
    """Also if the record has a column with the standard name."""
    with pytest.raises(BadRecord, match="field 'query' is missing") as message:
        rename_columns(record, {"prompt": "query"})
    assert "map prompt to it" in message.value.remedy
    assert rename_columns(TEXT, {"system": "query", "tools": "functions"}) == TEXT


def test_without_a_prompt_all_texts_are_kept() -> None:
    """Any of them may be the prompt, so that it can be reported."""
    schema = pa.schema([(name, pa.string()) for name in ("id", "chosen", "rejected", "post")])
    assert needed_columns({}, schema) == ["chosen", "rejected", "post"]
    record = {"chosen": "a", "rejected": "b", "post": "x", "likes": 3}
    assert rename_columns(record, {}) == {"chosen": "a", "rejected": "b", "post": "x"}


def test_unneeded_columns_are_not_decoded() -> None:
    names = ["id", "question", "best", "rejected", "embedding", "system", "preferred_output"]
    schema = pa.schema([(name, pa.string()) for name in names])
    read = ["question", "rejected", "system", "preferred_output"]
    assert needed_columns({}, schema) == read
    assert needed_columns({"chosen": "best"}, schema) == [read[0], "best", *read[1:]]
    assert needed_columns({"prompt": "id"}, schema) == ["id", *read]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"prompt": pa.string(), "input": image})
    assert needed_columns({}, schema) == ["prompt"]
    assert needed_columns({"chosen": "input"}, schema) == ["prompt", "input"]
