"""Lengths of preference pairs for benchmarks that pack them: of files, counted or estimated."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from result_file import ROOT

from megatron_idpo.data.pairs import Pair

BYTES_PER_TOKEN = 4
TEMPLATE_TOKENS = 4
"""Approximate tokens that a chat template adds to a message."""

Lengths = NDArray[np.int32]


class LengthsOnly:
    """Pairs of given lengths with one token id: packing does not read tokens."""

    def __init__(self, lengths_P3: Lengths) -> None:
        """Args: prompt, chosen and rejected lengths, int [P, 3]."""
        self.lengths_P3 = lengths_P3

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.lengths_P3)

    def __getitem__(self, index: int, /) -> Pair:
        """A pair with freshly made tokens, so that making them is timed too."""
        prompt, chosen, rejected = self.lengths_P3[index]
        return Pair(
            index,
            np.full(prompt, 7, np.int32),
            np.full(chosen, 7, np.int32),
            np.full(rejected, 7, np.int32),
        )


def tokenized_lengths(path: Path, tokenizer_path: str) -> Lengths:
    """Prompt, chosen and rejected tokens of every record of a chat preference file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
    texts: list[str] = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, tokenize=False
        )
        texts.append(prompt)
        for answer in (record["chosen"], record["rejected"]):
            whole = tokenizer.apply_chat_template(record["prompt"] + answer, tokenize=False)
            texts.append(whole[len(prompt) :])
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return np.array(counts, np.int32).reshape(-1, 3)


def estimated_lengths(path: Path) -> Lengths:
    """The same at `BYTES_PER_TOKEN`, with `TEMPLATE_TOKENS` for every message."""

    def tokens(messages: list[dict[str, str]]) -> int:
        num_bytes = sum(len(message["content"].encode()) for message in messages)
        return -(-num_bytes // BYTES_PER_TOKEN) + TEMPLATE_TOKENS * len(messages)

    records = [json.loads(line) for line in path.read_text().splitlines()]
    fields = ("prompt", "chosen", "rejected")
    return np.array([[tokens(record[field]) for field in fields] for record in records], np.int32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, how tokens are counted, and whether the result is saved."""
    parser.add_argument("files", nargs="*", type=Path, help="chat preference files (jsonl)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tokenizer", help="directory or hub name of a tokenizer")
    kind.add_argument("--synthetic-lengths", action="store_true", help="one token per 4 bytes")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")


def how_counted(options: argparse.Namespace) -> str:
    """How tokens are counted, for the report."""
    return "one token per 4 bytes" if options.synthetic_lengths else Path(options.tokenizer).name


def lengths_of_files(options: argparse.Namespace) -> Iterator[tuple[str, Lengths]]:
    """Name and lengths of each file: those named, else those of `../shared/data`."""
    for path in options.files or sorted((ROOT.parent / "shared" / "data").glob("*.jsonl")):
        if options.synthetic_lengths:
            yield path.stem, estimated_lengths(path)
        else:
            yield path.stem, tokenized_lengths(path, options.tokenizer)
