"""Columns of other names."""

import pytest

from megatron_idpo.data.sources.columns import columns_read, renamed
from megatron_idpo.data.sources.raw_record import BadRecord

TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_nothing_but_what_is_read_comes_out() -> None:
    assert renamed({**TEXT, "system": "s", "score": 1, "tools": []}, {}) == {**TEXT, "tools": []}
    assert renamed({**TEXT, "query": "x"}, {}) == TEXT
    assert renamed({**TEXT, "prompt": "", "query": "x"}, {}) == {
        **TEXT,
        "prompt": "",
        "query": "x",
    }, "to be told"
    assert renamed({**TEXT, "query": "x"}, {"prompt": "query"}) == {**TEXT, "prompt": "x"}
    assert renamed(["no", "record"], {"prompt": "query"}) == ["no", "record"]


def test_a_column_stands_for_one_thing() -> None:
    assert renamed(TEXT, {"chosen": "rejected"}) == {"prompt": "q", "chosen": "b"}


def test_columns_may_change_places() -> None:
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert renamed(TEXT, swapped) == {**TEXT, "chosen": "b", "rejected": "a"}


@pytest.mark.parametrize("record", [{"chosen": "a", "rejected": "b"}, {**TEXT, "query": None}])
def test_a_named_column_that_is_not_there(record: dict[str, str | None]) -> None:
    """Not even where ours is."""
    with pytest.raises(BadRecord, match="field 'query' is missing") as message:
        renamed(record, {"prompt": "query"})
    assert "has the prompt" in message.value.remedy
    assert renamed(TEXT, {"system": "query", "tools": "functions"}) == TEXT


def test_columns_that_need_not_be_decoded() -> None:
    present = ["id", "question", "best", "rejected", "embedding", "system"]
    assert columns_read({}, present) == ["question", "rejected"]
    named = {"chosen": "best", "system": "system"}
    assert columns_read(named, present) == ["question", "best", "rejected", "system"]
    assert columns_read({"prompt": "id"}, present) == ["id", "rejected"]
    assert columns_read({}, ["prompt", "input"]) == ["prompt"], "an image, say"
