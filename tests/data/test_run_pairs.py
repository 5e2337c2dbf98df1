"""Loading the pairs of a run: tokenizer, options, and held-out pairs that share no prompt."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.config.data import DataConfig, ModelConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.pairs import Pair
from megatron_idpo.data.run_pairs import (
    RunPairs,
    check_tokens,
    hold_out,
    load_run_pairs,
    tokenizer_path,
)
from megatron_idpo.data.tokenize.dataset import PairDataset
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
    pairs = load(train=write_jsonl(records(["a", "b"])))
    assert (len(pairs.train), pairs.eval, pairs.eval_report) == (2, None, None)
    assert pairs.train_report.kept_pairs == 2
    assert pairs.tokenizer.decode(pairs.train[0].chosen_tokens.tolist()) == " yes 0.</s>"


def test_tokens_beyond_the_vocabulary_are_refused(
    load: Callable[..., RunPairs], write_jsonl: Any
) -> None:
    pairs = load(train=write_jsonl(records(["a", "b"])))
    check_tokens(pairs, pairs.train.highest_token + 1)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: token \d+ occurs in the data"):
        check_tokens(pairs, pairs.train.highest_token)


def test_options_of_the_configuration_are_used(
    load: Callable[..., RunPairs], write_jsonl: Any, tmp_path: Path
) -> None:
    """Length, truncation, format, weights, bad rows: each by its effect."""
    train = write_jsonl([*records(["a", "b"]), b"{"])
    listed = tmp_path / "bad.jsonl"
    pairs = load(
        train=[{"path": train, "weight": 2}],
        eval=write_jsonl([*records(["c"]), b"{", b"["], "eval.jsonl"),
        max_length=8,
        on_bad_row="skip",
        bad_rows_file=str(listed),
    )
    assert len(pairs.train) == 4 and pairs.train_report.truncated_pairs == 2
    assert pairs.eval is not None and len(pairs.eval) == 1
    assert pairs.eval_report is not None and pairs.eval_report.skipped_rows == 2
    assert [json.loads(line)["row"] for line in listed.read_text().splitlines()] == [3]
    assert len((tmp_path / "bad.eval.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataError, match="more than max_length 8"):
        load(train=write_jsonl(records(["a"])), max_length=8, truncation="error")
    with pytest.raises(DataError, match="the format is 'chat'"):
        load(train=write_jsonl(records(["a"])), format="chat")


@pytest.mark.parametrize("held_out", [{"eval_pairs": 6}, {"eval_fraction": 0.29}])
def test_held_out_pairs_share_no_prompt_with_training_pairs(
    load: Callable[..., RunPairs], write_jsonl: Any, held_out: dict[str, float]
) -> None:
    """Six of twenty pairs, two to a prompt; weights repeat pairs on one side only."""
    path = write_jsonl(records([f"{at // 2}" for at in range(20)]))
    pairs = load(train=path, **held_out)
    assert pairs.eval is not None and pairs.eval_report is None
    assert (len(pairs.train), len(pairs.eval)) == (14, 6)
    assert not prompts(pairs.train).keys() & prompts(pairs.eval).keys()
    assert set(prompts(pairs.eval).values()) == {2}
    other = load(train=path, seed=1, **held_out)
    assert other.eval is not None and prompts(other.eval) != prompts(pairs.eval)
    twice = load(train={"path": path, "weight": 2}, eval_pairs=12)
    assert twice.eval is not None and prompts(twice.eval).keys() == prompts(pairs.eval).keys()


def test_holding_everything_out_is_refused(load: Callable[..., RunPairs], write_jsonl: Any) -> None:
    path = write_jsonl(records(["a", "a", "a"]))
    with pytest.raises(DataError, match=r"data.eval_pairs: holding out 1 of 3 pairs"):
        load(train=path, eval_pairs=1)
    with pytest.raises(DataError, match=r"data.eval_fraction: holding out 2 of 3 pairs"):
        load(train=path, eval_fraction=0.5)


class NumberedPairs:
    """Pairs whose prompts are the given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.lengths_P3 = np.ones((len(tokens), 3), np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Pair:
        answer = np.ones(1, np.int32)
        return Pair(index, np.array([self.tokens[index]], np.int32), answer, answer)


@settings(max_examples=50)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    num_pairs=st.integers(1, 50),
    seed=st.integers(-3, 3),
)
def test_fewest_whole_prompts_are_held_out(tokens: list[int], num_pairs: int, seed: int) -> None:
    held_out = hold_out(NumberedPairs(tokens), num_pairs, seed=seed)
    sizes = Counter(token for token, is_out in zip(tokens, held_out, strict=True) if is_out)
    assert all(tokens.count(token) == size for token, size in sizes.items())
    assert sizes.total() >= min(num_pairs, len(tokens))
    assert sizes.total() - max(sizes.values()) < num_pairs


def test_tokenizer_path(tmp_path: Path) -> None:
    assert tokenizer_path(ModelConfig(path="owner/name")) == "owner/name"
    (tmp_path / "huggingface").mkdir()
    assert tokenizer_path(ModelConfig(path=str(tmp_path))) == str(tmp_path / "huggingface")
    assert tokenizer_path(ModelConfig(path=str(tmp_path), tokenizer="t")) == "t"
