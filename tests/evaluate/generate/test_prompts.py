"""Prompts of pairs and of separate sources: each distinct one once, in the order of the data."""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.data.sources.preferences import Format
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.generate.prompts import (
    PromptRecord,
    choose,
    load_prompts,
    source_prompts,
)

from .tiny_answers import pair, user, write_records, write_tokenizer


def read(
    path: str, *, format: Format = "auto", has_template: bool = True, skip: bool = False
) -> list[PromptRecord]:
    found, skipped = source_prompts(
        [open_source(SourceConfig(path=path))], format=format, has_template=has_template, skip=skip
    )
    assert skipped == int(skip)
    return found


def prompts(records: list[PromptRecord]) -> list[Any]:
    return [record.prompt for record in records]


HH = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Really?\n\nAssistant:"
HH_MESSAGES = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Really?"},
]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": user("Why?")}, user("Why?")),
        ({"prompt": "Why?"}, "Why?"),
        ({"prompt": "Why?", "answer": "unread"}, "Why?"),
        (pair(user("Why?")), user("Why?")),
        ({"prompt": "Why?", "chosen": " So.", "rejected": " No."}, "Why?"),
        ({"chosen": "Why? So.", "rejected": "Why? No."}, "Why?"),  # the common prefix
        ({"chosen": HH + " Yes.", "rejected": HH + " No."}, HH_MESSAGES),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
            user("Why?"),
        ),
    ],
)
def test_record_formats(tmp_path: Path, record: Any, prompt: Any) -> None:
    [found] = read(write_records(tmp_path / "p.jsonl", [record]))
    assert found.prompt == prompt
    assert found.location == f"{tmp_path}/p.jsonl:1"


def test_column_names_and_single_turn_records(tmp_path: Path) -> None:
    path = write_records(tmp_path / "p.jsonl", [{"instruction": "Why?", "setting": "Brief."}])
    with pytest.raises(DataError, match="no field 'prompt', but 'instruction'"):
        read(path)
    columns: Any = {"prompt": "instruction", "system": "setting"}
    found, _ = source_prompts(
        [open_source(SourceConfig(path=path, columns=columns))],
        format="single_turn",
        has_template=True,
        skip=False,
    )
    assert prompts(found) == [[{"role": "system", "content": "Brief."}, *user("Why?")]]


def test_with_format_hh_a_transcript_becomes_messages(tmp_path: Path) -> None:
    path = write_records(tmp_path / "p.jsonl", [{"prompt": HH}])
    assert prompts(read(path, format="hh")) == [HH_MESSAGES]


def test_tools_and_template_arguments_are_kept(tmp_path: Path) -> None:
    record = {"prompt": user("x"), "tools": [{"f": 1}], "chat_template_kwargs": {"k": True}}
    [found] = read(write_records(tmp_path / "p.jsonl", [record]))
    assert (found.tools, found.template_kwargs) == ([{"f": 1}], {"k": True})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "So."}, r"p\.jsonl:2: field 'prompt' is missing"),
        ({"question": "Why?"}, r"p\.jsonl:2: there is no field 'prompt', but 'question'"),
        ({"prompt": ""}, r"p\.jsonl:2: 'prompt' is empty"),
        ({"prompt": 3}, "'prompt' is 3, neither text nor"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, "roles are"),
        ({"prompt": "x", "chosen": "y"}, "field 'rejected' is missing"),
        ("text", "not an object with fields"),
    ],
)
def test_a_row_without_prompt_is_reported_with_its_location(
    tmp_path: Path, record: Any, message: str
) -> None:
    path = write_records(tmp_path / "p.jsonl", [{"prompt": "x"}, record])
    with pytest.raises(DataError, match=message):
        read(path)
    assert prompts(read(path, skip=True)) == ["x"]


def test_at_most_ten_invalid_rows_are_listed(tmp_path: Path) -> None:
    path = write_records(tmp_path / "p.jsonl", [{}] * 20)
    with pytest.raises(DataError) as caught:
        read(path)
    assert len(caught.value.problems) == 10


def test_empty_sources_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match="have no records"):
        read(str(tmp_path / "p.jsonl"))


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    path = write_records(tmp_path / "p.jsonl", [{"prompt": user("x")}])
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        read(path, has_template=False)


# ---- the choice --------------------------------------------------------------------------------


def numbered(count: int) -> list[PromptRecord]:
    return [PromptRecord(f"p:{at}", f"Question {at}?") for at in range(count)]


def test_choice_keeps_the_order_and_depends_on_the_seed() -> None:
    records = numbered(50)
    first, again, other = (choose(records, 10, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 10 and first == sorted(first, key=records.index)
    assert first != records[:10]


def test_added_prompts_change_the_choice_little() -> None:
    before, after = (choose(numbered(count), 10, seed=0) for count in (50, 55))
    assert len({r.key for r in before} & {r.key for r in after}) >= 8


def test_few_prompts_are_all_taken() -> None:
    assert choose(numbered(3), 10, seed=0) == choose(numbered(3), None, seed=0) == numbered(3)


# ---- of a run ----------------------------------------------------------------------------------


def config(root: Path, **sections: dict[str, Any]) -> RunConfig:
    import yaml

    write_tokenizer(root / "model")
    path = root / "config.yaml"
    model = {"path": str(root / "model")}
    path.write_text(yaml.safe_dump({"model": model, **sections}))
    return load_config(path, required=["model"], optional=["data", "generate", "evaluate"])


def held_out(root: Path, **fields: Any) -> list[PromptRecord]:
    records = [pair(user(f"Q{at % 6}?"), chosen=f"Yes, {at}.") for at in range(12)]
    train = write_records(root / "t.jsonl", records)
    data = {"train": train, "cache": str(root / "cache"), "num_workers": 1, **fields}
    found, skipped = load_prompts(config(root, data=data), has_template=True)
    assert skipped == 0
    return found


def test_each_prompt_of_held_out_pairs_is_used_once(tmp_path: Path) -> None:
    path = write_records(
        tmp_path / "e.jsonl", [pair(user(t), c) for t, c in [("b", "1"), ("a", "2"), ("b", "3")]]
    )
    found = held_out(tmp_path, eval=path)
    assert prompts(found) == [user("b"), user("a")]
    assert [record.location for record in found] == [f"{path}:1", f"{path}:2"]


def test_pairs_held_out_from_the_training_data(tmp_path: Path) -> None:
    found = held_out(tmp_path, eval_pairs=4)
    assert len(found) == 2  # of six prompts, each in two pairs
    rows = [int(record.location.rpartition(":")[2]) for record in found]
    assert [user(f"Q{(row - 1) % 6}?") for row in rows] == prompts(found)


def test_separate_sources_need_no_data_section(tmp_path: Path) -> None:
    one = write_records(tmp_path / "1.jsonl", [{"prompt": text} for text in "abc"])
    two = write_records(tmp_path / "2.jsonl", [{"prompt": text} for text in "cbd"])
    generate = {"prompts": [one, two]}
    found, _ = load_prompts(config(tmp_path, generate=generate), has_template=True)
    assert prompts(found) == ["a", "b", "c", "d"]
    chosen = config(tmp_path, generate={**generate, "max_prompts": 2}, evaluate={"seed": 4})
    assert load_prompts(chosen, has_template=True) == (choose(found, 2, seed=4), 0)


def test_a_weight_is_refused(tmp_path: Path) -> None:
    generate = {"prompts": [{"path": "p.jsonl", "weight": 2.0}]}
    message = r"generate\.prompts: p\.jsonl has a weight, but each prompt is answered once"
    with pytest.raises(ConfigError, match=message):
        load_prompts(config(tmp_path, generate=generate), has_template=True)
