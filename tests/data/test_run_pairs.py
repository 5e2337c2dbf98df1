"""A configuration becomes pairs: tokenizer, sources, and held-out pairs that share no prompt."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sections import DataConfig, ModelConfig
from megatron_idpo.data.run_pairs import (
    RunPairs,
    check_tokens,
    hold_out,
    load_run_pairs,
    tokenizer_path,
)
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.data.tokenize.pair import Pair
from megatron_idpo.errors import ConfigError, DataError


@pytest.fixture
def load(text_tokenizer_path: str, tmp_path: Path) -> Callable[..., RunPairs]:
    def load_with(**data: Any) -> RunPairs:
        config = RunConfig.model_construct(
            model=ModelConfig(path=text_tokenizer_path),
            data=DataConfig.model_validate({"cache": str(tmp_path / "cache"), **data}),
        )
        return load_run_pairs(config)

    return load_with


def records(prompts: list[str]) -> list[dict[str, str]]:
    return [
        {"prompt": prompt + "#", "chosen": f" yes {at}.", "rejected": f" no {at}."}
        for at, prompt in enumerate(prompts)
    ]


def prompts(pairs: PairDataset) -> Counter[bytes]:
    return Counter(pairs[index].prompt_tokens.tobytes() for index in range(len(pairs)))


def test_without_held_out_pairs(load: Callable[..., RunPairs], write_jsonl: Any) -> None:
    found = load(train=write_jsonl(records(["a", "b"])))
    assert (len(found.train), found.eval, found.eval_report) == (2, None, None)
    assert found.train_report.kept_pairs == 2
    assert found.tokenizer.decode(found.train[0].chosen_tokens.tolist()) == " yes 0.</s>"


def test_tokens_beyond_the_models_vocabulary_are_refused(
    load: Callable[..., RunPairs], write_jsonl: Any
) -> None:
    pairs = load(train=write_jsonl(records(["a", "b"])))
    check_tokens(pairs, pairs.train.highest_token + 1)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: token \d+ occurs in the data"):
        check_tokens(pairs, pairs.train.highest_token)


def test_the_options_of_the_configuration_reach_the_reader(
    load: Callable[..., RunPairs], write_jsonl: Any, tmp_path: Path
) -> None:
    """Length, truncation, format, weights, bad rows: each seen by what it does."""
    train = write_jsonl([*records(["a", "b"]), b"{"])
    listed = tmp_path / "bad.jsonl"
    found = load(
        train=[{"path": train, "weight": 2}],
        eval=write_jsonl([*records(["c"]), b"{", b"["], "eval.jsonl"),
        max_length=8,
        on_bad_row="skip",
        bad_rows_file=str(listed),
    )
    assert len(found.train) == 4 and found.train_report.truncated_pairs == 2
    assert found.eval is not None and len(found.eval) == 1
    assert found.eval_report is not None and found.eval_report.skipped_rows == 2
    assert [json.loads(line)["row"] for line in listed.read_text().splitlines()] == [3]
    assert len((tmp_path / "bad.eval.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataError, match="more than max_length 8"):
        load(train=write_jsonl(records(["a"])), max_length=8, truncation="error")
    with pytest.raises(DataError, match="the format is 'chat'"):
        load(train=write_jsonl(records(["a"])), format="chat")


@pytest.mark.parametrize("wanted", [{"eval_pairs": 6}, {"eval_fraction": 0.29}])
def test_held_out_pairs_share_no_prompt_with_the_others(
    load: Callable[..., RunPairs], write_jsonl: Any, wanted: dict[str, float]
) -> None:
    """Six of twenty pairs, two to a prompt; weights repeat pairs on one side only."""
    path = write_jsonl(records([f"{at // 2}" for at in range(20)]))
    found = load(train=path, **wanted)
    assert found.eval is not None and found.eval_report is None
    assert (len(found.train), len(found.eval)) == (14, 6)
    assert not prompts(found.train).keys() & prompts(found.eval).keys()
    assert set(prompts(found.eval).values()) == {2}
    other = load(train=path, seed=1, **wanted)
    assert other.eval is not None and prompts(other.eval) != prompts(found.eval)
    twice = load(train={"path": path, "weight": 2}, eval_pairs=12)
    assert twice.eval is not None and prompts(twice.eval).keys() == prompts(found.eval).keys()


def test_holding_everything_out_is_refused(load: Callable[..., RunPairs], write_jsonl: Any) -> None:
    path = write_jsonl(records(["a", "a", "a"]))
    with pytest.raises(DataError, match=r"data.eval_pairs: holding out 1 of 3 pairs"):
        load(train=path, eval_pairs=1)
    with pytest.raises(DataError, match=r"data.eval_fraction: holding out 2 of 3 pairs"):
        load(train=path, eval_fraction=0.5)


class MadePairs:
    """Pairs whose prompts are given numbers."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.lengths_P3 = np.ones((len(numbers), 3), np.int32)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Pair:
        answer = np.ones(1, np.int32)
        return Pair(index, np.array([self.numbers[index]], np.int32), answer, answer)


@given(
    numbers=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    wanted=st.integers(1, 50),
    seed=st.integers(-3, 3),
)
def test_whole_prompts_the_fewest_that_do(numbers: list[int], wanted: int, seed: int) -> None:
    held_out = hold_out(MadePairs(numbers), wanted, seed=seed)
    sizes = Counter(number for number, is_out in zip(numbers, held_out, strict=True) if is_out)
    assert all(numbers.count(number) == size for number, size in sizes.items())
    assert sizes.total() >= min(wanted, len(numbers))
    assert sizes.total() - max(sizes.values()) < wanted


def test_the_tokenizer_is_where_the_model_keeps_it(tmp_path: Path) -> None:
    assert tokenizer_path(ModelConfig(path="owner/name")) == "owner/name"
    (tmp_path / "huggingface").mkdir()
    assert tokenizer_path(ModelConfig(path=str(tmp_path))) == str(tmp_path / "huggingface")
    assert tokenizer_path(ModelConfig(path=str(tmp_path), tokenizer="t")) == "t"
