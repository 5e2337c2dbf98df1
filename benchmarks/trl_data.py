"""The common input of both sides of a comparison with TRL: records and initial adapter."""

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl_case import SEED, TARGETS

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer


def choose_records(
    source: Path, target: Path, model: str, max_length: int, pairs: int, seed: int | None = None
) -> None:
    """Write `pairs` records in the order of training, spread evenly over the file or drawn by seed.

    Only pairs that both sides keep: those whose prompt is not too long.
    """
    kept = load_pairs(
        [SourceConfig(path=str(source))],
        load_tokenizer(model),
        TokenOptions(max_length=max_length),
        cache=target.parent / "tokens",
        num_workers=1,
    )
    rows = [int(kept.location(index).rpartition(":")[2]) for index in range(len(kept))]
    lines = source.read_text().splitlines()
    if seed is None:
        chosen_rows = [rows[number * len(rows) // pairs] for number in range(pairs)]
    else:
        chosen_rows = random.Random(seed).sample(rows, pairs)
    chosen = [lines[row - 1] for row in chosen_rows]
    target.write_text("".join(f"{line}\n" for line in chosen))
    order = stream_pairs(0, pairs, num_pairs=pairs, seed=SEED)
    target.with_suffix(".ordered.jsonl").write_text(
        "".join(f"{chosen[index]}\n" for index in order)
    )


def write_adapter(model: str, target: Path, rank: int, seed: int = SEED) -> None:
    """Write a new PEFT adapter, from which both sides start."""
    torch.manual_seed(seed)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(TARGETS)
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    get_peft_model(base, settings).save_pretrained(target)
