"""Tokens of prompts equal those of training."""

from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.generate.prompt_tokens import prompt_tokens
from megatron_idpo.evaluate.generate.prompts import PromptRecord, source_prompts

from .tiny_answers import CHATML, EOS, pair, user, write_records, write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(str(directory))


def test_tokens_equal_those_of_training(directory: Path, tmp_path: Path) -> None:
    template = "{{ tools or '' }}" + CHATML
    tokenizer = load_tokenizer(str(directory), template)
    long = [*user("Why?"), {"role": "assistant", "content": "So."}, *user("Really, é?")]
    records: list[dict[str, Any]] = [
        {**pair(user("Why?")), "tools": [{"f": 1}]},
        pair([{"role": "system", "content": "Be brief."}, *long]),
        {"prompt": "Some text", "chosen": " yes", "rejected": " no"},
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: a",
            "rejected": "\n\nHuman: Why?\n\nAssistant: b",
        },
    ]
    pairs = load_pairs(
        [SourceConfig(path=write_records(tmp_path / "p.jsonl", records))],
        tokenizer,
        TokenOptions(),
        cache=tmp_path / "cache",
        num_workers=1,
    )
    prompts, _ = source_prompts(pairs.sources, format="auto", has_template=True)
    trained = [pairs[at].prompt_tokens.tolist() for at in range(4)]
    assert prompt_tokens(prompts, tokenizer) == trained


def test_a_prompt_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    [tokens] = prompt_tokens([PromptRecord("p:1", user("Why?"))], tokenizer)
    assert tokenizer.decode(tokens).endswith("Why?<|im_end|>\n<|im_start|>assistant\n")


class EndingTokenizer:
    """A tokenizer that appends EOS to every text, as some do."""

    eos_id = EOS
    has_chat_template = False

    def encode(self, texts: list[str], *, special_tokens: bool) -> list[list[int]]:
        return [[*map(ord, text), *([EOS] if special_tokens else [])] for text in texts]


def test_eos_that_the_tokenizer_appends_is_removed() -> None:
    tokenizer: Any = EndingTokenizer()
    assert prompt_tokens([PromptRecord("p:1", "ab")], tokenizer) == [[97, 98]]
    with_eos = PromptRecord("p:1", "a\x01")  # written there by the user
    assert prompt_tokens([with_eos], tokenizer) == [[97, EOS, EOS]]


def test_invalid_prompts_are_reported_with_their_location(
    directory: Path, tokenizer: Tokenizer
) -> None:
    fails = load_tokenizer(str(directory), "{{ raise_exception('no ' ~ messages[0].role) }}")
    with pytest.raises(DataError, match=r"p:1: the chat template fails: .*no user"):
        prompt_tokens([PromptRecord("p:1", user("x"))], fails)
    with pytest.raises(DataError, match="p:2: the prompt has no tokens"):
        prompt_tokens([PromptRecord("p:2", "")], tokenizer)
    with pytest.raises(DataError, match="p:3: the prompt contains a lone surrogate"):
        prompt_tokens([PromptRecord("p:3", user("\ud800"))], tokenizer)


def test_messages_need_a_template(directory: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=None)
    bare = load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"p:1: .*no chat template; set data\.chat_template"):
        prompt_tokens([PromptRecord("p:1", user("x"))], bare)
