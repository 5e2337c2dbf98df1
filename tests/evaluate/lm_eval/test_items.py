"""Local items: selection of files, and validation of lines."""

import json
from pathlib import Path

import pytest

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.lm_eval.items import read_items

from .example_items import ARC, arc, hellaswag, mmlu, truthfulqa, write, write_items

SHARED = Path(__file__).parents[4] / "shared" / "eval"


def test_files_are_selected_by_their_stem(tmp_path: Path) -> None:
    items = read_items(write_items(tmp_path / "items"), H4_TASKS)
    assert {task: found.file.name for task, found in items.items()} == {
        "arc_challenge": "arc_challenge_test.jsonl",
        "hellaswag": "hellaswag_val.jsonl",
        "mmlu": "mmlu.jsonl",
        "truthfulqa_mc2": "truthfulqa_mc.jsonl",
    }
    assert all(found.examples is None for found in items.values())
    assert len(items["arc_challenge"].asked) == ARC


def test_second_file_has_the_examples(tmp_path: Path) -> None:
    write(tmp_path / "arc_challenge.jsonl", arc(3))
    write(tmp_path / "arc_challenge_train_25.jsonl", arc(30, seed=1))
    found = read_items(tmp_path, ["arc_challenge"])["arc_challenge"]
    assert len(found.asked) == 3 and found.examples is not None and len(found.examples) == 30
    assert list(found.digests) == ["arc_challenge.jsonl", "arc_challenge_train_25.jsonl"]


def test_ids_are_dropped_so_that_copies_are_equal(tmp_path: Path) -> None:
    row = arc(1)[0]
    write(tmp_path / "arc_challenge.jsonl", [row, {**row, "id": "another"}])
    first, second = read_items(tmp_path, ["arc_challenge"])["arc_challenge"].asked
    assert first == second


def test_exact_name_is_preferred(tmp_path: Path) -> None:
    write(tmp_path / "mmlu.jsonl", mmlu({"anatomy": 2}))
    write(tmp_path / "mmlu_old.jsonl", mmlu({"anatomy": 1}))
    assert len(read_items(tmp_path, ["mmlu"])["mmlu"].asked) == 2


def test_missing_and_ambiguous_files_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "hellaswag_a.jsonl", hellaswag(1))
    write(tmp_path / "hellaswag_b.jsonl", hellaswag(1))
    with pytest.raises(ConfigError, match=r"hellaswag_a\.jsonl, hellaswag_b\.jsonl"):
        read_items(tmp_path, ["hellaswag"])
    with pytest.raises(ConfigError, match=r"no file mmlu\.jsonl .* leave mmlu out of h4\.tasks"):
        read_items(tmp_path, ["mmlu"])


def test_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        read_items(tmp_path / "none", ["mmlu"])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("arc_challenge", {**arc(1)[0], "answerKey": "X"}, "its answer is not among"),
        ("hellaswag", {**hellaswag(1)[0], "label": "4"}, "its answer is not among"),
        ("mmlu", {**mmlu({"anatomy": 1})[0], "answer": "B"}, "answer is 'B', not int"),
        ("mmlu", {**mmlu({"anatomy": 1})[0], "choices": ["a", "", "c", "d"]}, "list of texts"),
        ("mmlu", {"question": "?"}, "KeyError: 'subject'"),
        (
            "truthfulqa_mc2",
            {"question": "?", "mc2_targets": {"choices": ["a"], "labels": [0]}},
            "its answer is not among",
        ),
    ],
)
def test_invalid_line_is_reported_with_its_location(
    tmp_path: Path, name: str, row: dict[str, object], message: str
) -> None:
    good = {"arc_challenge": arc(1), "hellaswag": hellaswag(1), "truthfulqa_mc2": truthfulqa(1)}
    path = write(tmp_path / f"{name}.jsonl", [*good.get(name, mmlu({"anatomy": 1})), row])
    with pytest.raises(DataError) as caught:
        read_items(tmp_path, [name])
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_empty_file_and_invalid_json_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "mmlu.jsonl"
    path.write_text("\nnonsense\n")
    with pytest.raises(DataError, match=r"mmlu\.jsonl:2: is not an item \(JSONDecodeError"):
        read_items(tmp_path, ["mmlu"])
    path.write_text("\n")
    with pytest.raises(DataError, match="has no items"):
        read_items(tmp_path, ["mmlu"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared items")
def test_shared_items_are_read() -> None:
    tasks = ["arc_challenge", "hellaswag", "truthfulqa_mc2"]
    items = read_items(SHARED, tasks)
    for found in items.values():
        lines = found.file.read_text("utf-8").splitlines()
        assert [row["question"] for row in found.asked if "question" in row] == [
            row["question"] for row in map(json.loads, lines) if "question" in row
        ]
        assert len(found.asked) == len(lines)
