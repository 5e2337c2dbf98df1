"""Tiny chat models and configurations for the tests of `generate`.

The tokenizer has one token per byte, four special tokens and the ChatML template, whose end-of-turn
token is not EOS.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_idpo.config.evaluate import GenerateConfig
from megatron_idpo.evaluate.generate.answers import answers_file
from megatron_idpo.evaluate.generate.models import InspectedModel, Task
from megatron_idpo.evaluate.generate.transformers_engine import TransformersEngine
from megatron_idpo.testing import write_tiny_hf_model

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
EOS, TURN_END = 1, 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "num_hidden_layers": 2,
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": [EOS, TURN_END],
}
QUESTIONS = ("Why?", "How do I ripen a pear?", "Who are you, and who am I?", "é?", "What is 2+2?")


def write_tokenizer(directory: Path, template: str | None = CHATML) -> None:
    """Writes a tokenizer with one token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: at for at, text in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def write_model(directory: Path, seed: int = 3, **overrides: Any) -> Path:
    """Writes a random model with the tokenizer."""
    write_tiny_hf_model(directory, "llama", seed=seed, **{**SIZES, **overrides})
    write_tokenizer(directory)
    return directory


def user(text: str) -> list[dict[str, str]]:
    """One user message."""
    return [{"role": "user", "content": text}]


def pair(prompt: Any, chosen: str = "Yes.", rejected: str = "No.") -> dict[str, Any]:
    """A preference pair of messages."""
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def write_records(path: Path, records: Sequence[Any]) -> str:
    """Writes a file of JSON lines; returns its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_config(root: Path, model: Path, **sections: Any) -> Path:
    """Writes a configuration; its prompts default to `QUESTIONS`."""
    prompts = root / "prompts.jsonl"
    if not prompts.exists():
        write_records(prompts, [{"prompt": user(text)} for text in QUESTIONS])
    generate = {"prompts": str(prompts), "max_new_tokens": 12, "batch_prompts": 2}
    evaluate = {"models": {"one": str(model)}, "output": str(root / "out")}
    config = {
        "model": {"path": str(model), "dtype": "fp32"},
        **sections,
        "generate": {**generate, **sections.get("generate", {})},
        "evaluate": {**evaluate, **sections.get("evaluate", {})},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def answered(root: Path, name: str = "one") -> bytes:
    """Content of a model's file of answers."""
    return answers_file(root / "out", name).read_bytes()


def engine_task(
    model: InspectedModel,
    sampling: GenerateConfig,
    *,
    stop_tokens: Sequence[int],
    seed: int,
    prompts: Sequence[Sequence[int]] = (),
) -> Task:
    """What an engine needs; it reads neither texts nor files."""
    tokenizer: Any = None
    return Task(
        model,
        tokenizer,
        records=[],
        prompts=prompts,
        stop_tokens=stop_tokens,
        sampling=sampling,
        seed=seed,
        settings={},
        batch_prompts=1,
        engine="transformers",
        path=Path("unused"),
    )


def no_model_is_loaded() -> Any:
    """Loading a model raises within the block."""
    return patch.object(TransformersEngine, "__init__", side_effect=AssertionError("loaded"))
