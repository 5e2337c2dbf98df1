"""Records of inputs: comparison, messages, reading and writing."""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError, ConfigError, DataError, Problem
from megatron_idpo.storage.provenance import (
    as_problems,
    diff,
    file_digest,
    read_record,
    write_record,
)

DIGEST = "a" * 64
OTHER_DIGEST = "b" * 64


def messages(saved: dict[str, Any], current: dict[str, Any], **labels: str) -> list[str]:
    return [str(difference) for difference in diff(saved, current, labels)]


def test_equal_records_have_no_difference() -> None:
    record = {"weights": DIGEST, "sampling": {"seed": 1, "top_p": None}, "layers": [1, 2]}
    assert diff(record, {**record, "layers": (1, 2)}) == []
    assert diff({"pairs": [["a", "b"]]}, {"pairs": (("a", "b"),)}) == []


def test_long_value_that_is_not_a_digest_is_shown() -> None:
    path = "/" + 63 * "x"
    assert messages({"tokenizer": path}, {"tokenizer": "here"}) == [
        f"tokenizer was {path}, is now here"
    ]


def test_missing_part_equals_none() -> None:
    assert diff({"adapter": None}, {}) == []
    assert messages({"adapter": None}, {"adapter": {"rank": 8}}) == [
        "adapter.rank was not set, is now 8"
    ]
    assert messages({"rank": 8}, {}) == ["rank was 8, is now not set"]


def test_nested_part_is_named_with_its_section() -> None:
    saved, current = {"a": {"b": {"c": 1}}, "d": 2}, {"a": {"b": {"c": 3}}, "d": 2}
    (difference,) = diff(saved, current)
    assert (difference.name, difference.saved, difference.current) == ("a.b.c", 1, 3)
    assert str(difference) == "a.b.c was 1, is now 3"


def test_every_difference_is_listed_in_the_order_of_the_current_record() -> None:
    differences = diff({"z": 1, "a": 1, "gone": 1}, {"a": 2, "z": 2})
    assert [difference.name for difference in differences] == ["a", "z", "gone"]


def test_message_uses_label_and_hides_digests() -> None:
    assert messages({"seed": 1}, {"seed": 2}, seed="data.seed") == ["data.seed was 1, is now 2"]
    assert messages({"w": DIGEST}, {"w": OTHER_DIGEST}, w="the model") == ["the model differs"]
    assert messages({"w": DIGEST}, {"w": None}, w="the model") == ["the model differs"]


def test_problems_have_location_and_remedy() -> None:
    assert as_problems(diff({"a": 1}, {"a": 2}), "out/x.json", "delete it") == [
        Problem("out/x.json", "a was 1, is now 2", "delete it")
    ]


def test_record_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    record = {"model": {"path": "Modèle", "dtype": "bf16"}, "seed": 1}
    write_record(path, record, error=ConfigError)
    assert read_record(path, error=DataError, remedy="") == record
    assert "Modèle" in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "is not valid JSON: "),
        (b"\xff", "is not valid JSON: "),
        (b"[]", "is not a JSON object"),
    ],
)
def test_unreadable_record_is_reported(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_record(path, error=DataError, remedy="delete it")
    (problem,) = raised.value.problems
    assert problem.location == str(path) and problem.remedy == "delete it"
    assert problem.message.startswith(reason)


def test_unwritable_record_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"x\.json: cannot be written: No such file.*; check that"
    ):
        write_record(tmp_path / "missing" / "x.json", {}, error=ConfigError)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(CheckpointError, match=r"x: cannot be read: No such file.*; make it read"):
        file_digest(tmp_path / "x")
