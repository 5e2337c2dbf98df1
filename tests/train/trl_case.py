"""Inputs of TRL and of our runs: a model, its tokenizer, 32 conversations, 10 steps.

stories260K and human-labeled pairs from the shared directory if they exist; otherwise a random tiny
Llama, a tokenizer trained here and random pairs.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.testing import write_tiny_hf_model

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
LABELLED = SHARED / "data" / "hh_harmless_base_test.jsonl"

NUM_PAIRS = 32
BATCH_PAIRS = 8
STEPS = 10
SEED = 3
EPOCHS = -(-STEPS * BATCH_PAIRS // NUM_PAIRS)
MAX_LENGTH = 160
"""Some answers are truncated."""

PROMPT_BYTES = 120
"""Maximum prompt size, so that an answer fits."""

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class TrlCase:
    """The files of a case."""

    model: Path
    """With its tokenizer, which has no chat template."""

    records: Path
    """32 pairs, for us."""

    ordered: Path
    """The pairs of 10 steps in our order, for TRL."""

    num_layers: int

    lrs: dict[str, float]
    """By what is trained, `lora` or `full`: high enough that the losses move."""

    clip_grads: dict[str, float]
    """Below the norms of some steps and above those of others."""


def make_case(directory: Path, *, shared: bool = STORIES.exists() and LABELLED.exists()) -> TrlCase:
    """Write a case's files."""
    model = directory / "model"
    if shared:
        shutil.copytree(STORIES, model, copy_function=shutil.copyfile)
        lines = LABELLED.read_text().splitlines()
        records = [record for line in lines if _is_short(record := json.loads(line))][:NUM_PAIRS]
        lrs, clip_grads = {"lora": 5e-4, "full": 2e-5}, {"lora": 4.5, "full": 18.5}
    else:
        write_tiny_hf_model(model, "llama", seed=SEED, vocab_size=512, initializer_range=0.05)
        records = _made_up_records()
        _write_tokenizer(model, records)
        lrs, clip_grads = {"lora": 1e-3, "full": 1e-4}, {"lora": 1.9, "full": 6.0}
    assert len(records) == NUM_PAIRS
    order = stream_pairs(0, STEPS * BATCH_PAIRS, num_pairs=NUM_PAIRS, seed=SEED)
    return TrlCase(
        model,
        _write_records(directory / "records.jsonl", records),
        _write_records(directory / "ordered.jsonl", [records[index] for index in order]),
        json.loads((model / "config.json").read_text())["num_hidden_layers"],
        lrs,
        clip_grads,
    )


def _is_short(record: dict[str, Any]) -> bool:
    return sum(len(message["content"].encode()) for message in record["prompt"]) <= PROMPT_BYTES


def _write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def _made_up_records() -> list[dict[str, Any]]:
    """Conversations of random words; the preferred answers prefer some of them."""
    random = Random(SEED)
    words = ["".join(random.choices("abcdefghij", k=random.randint(2, 7))) for _ in range(200)]

    def message(role: str, vocabulary: list[str], most: int) -> dict[str, str]:
        content = " ".join(random.choices(vocabulary, k=random.randint(2, most)))
        return {"role": role, "content": content}

    return [
        {
            "prompt": [message("user", words, 8)],
            "chosen": [message("assistant", words[:120], 60)],
            "rejected": [message("assistant", words[80:], 60)],
        }
        for _ in range(NUM_PAIRS)
    ]


def _write_tokenizer(directory: Path, records: list[dict[str, Any]]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((json.dumps(record) for record in records), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
