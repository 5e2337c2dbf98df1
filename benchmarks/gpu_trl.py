"""TRL's DPOTrainer on a GPU, on the shapes of `gpu_step.py`: step time, pairs/s, peak memory.

    python benchmarks/gpu_trl.py CASE [--steps 4]

Prints a line of JSON. Model, LoRA settings, dropout, recompute, pairs per step and their lengths
are those of the case; weights and tokens are random; every step computes the reference. TRL repeats
the prompt for both answers: a pair has 1280 positions instead of 1024. Liger's kernels are
used where `liger_kernel` is installed. Taps are `IntermediateDpo` of `trl_theirs.py`, which needs
an adapter. The first step warms up and is not counted.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from gpu_step import CASES, MODELS, PAIR_TOKENS, Case
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils
from trl_case import BETA, SEED, TARGETS
from trl_theirs import IntermediateDpo

MICRO_PAIRS = 4
"""On the device at a time: 5120 positions, where a row of ours has 4096."""

WORDS = [f"w{index}" for index in range(500)]


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if "PHANTOM_ARITHMETIC" in os.environ:  # where Triton's kernels compute nothing
        trl_utils._use_triton = lambda device: False
    print(json.dumps(measure(CASES[arguments.case], arguments.steps)))


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Train `steps` steps after a first one."""
    pairs = case.pairs
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = _trainer(case, pairs, steps + 1, output)
        trainer.add_callback(clock)
        trainer.train()
    step_s = statistics.median(end - start for start, end in pairwise(clock.ends_s))
    return {
        "device": torch.cuda.get_device_name(),
        "trl_peak_bytes": torch.cuda.max_memory_allocated(),
        "step_s": step_s,
        "pairs_per_s": pairs / step_s,
        "liger": _has_liger(),
    }


class _StepClock(TrainerCallback):  # type: ignore[misc]
    """The end of each step, when the GPU has finished it."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self.ends_s.append(time.perf_counter())


def _trainer(case: Case, pairs: int, steps: int, output: str) -> Any:
    is_bf16 = case.dtype == "bf16"
    torch.set_default_dtype(torch.bfloat16 if is_bf16 else torch.float32)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**MODELS[case.model]), trust_remote_code=False
        )
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=16, lora_dropout=0.05, target_modules=list(TARGETS)
    )
    micro_pairs = min(MICRO_PAIRS, pairs)
    trainer = (IntermediateDpo if case.layers else DPOTrainer)(
        model,
        args=DPOConfig(
            output,
            beta=BETA,
            max_length=PAIR_TOKENS,
            per_device_train_batch_size=micro_pairs,
            gradient_accumulation_steps=pairs // micro_pairs,
            bf16=is_bf16,
            learning_rate=1e-6,
            max_steps=steps,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=case.recompute == "full",
            disable_dropout=False,
            use_liger_kernel=_has_liger(),
            seed=SEED,
        ),
        train_dataset=_pairs(case, pairs * steps),
        processing_class=_tokenizer(),
        peft_config=lora if case.lora else None,
    )
    num_layers = MODELS[case.model]["num_hidden_layers"]
    trainer.intermediate_layers = tuple(
        layer if isinstance(layer, int) else round(layer * num_layers) for layer in case.layers
    )
    return trainer


def _pairs(case: Case, count: int) -> Dataset:
    """Pairs as those of `random_step.full_batch`: a quarter prompt, the others two answers."""
    draw = random.Random(SEED)
    length = min(PAIR_TOKENS, case.row_tokens)
    prompt, answer = length // 4, length * 3 // 8 - 1  # TRL appends the end of the answer
    columns = {"prompt": prompt, "chosen": answer, "rejected": answer}
    return Dataset.from_list(
        [
            {name: " ".join(draw.choices(WORDS, k=size)) + " " for name, size in columns.items()}
            for _ in range(count)
        ]
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that texts have exact lengths."""
    names = ["<unk>", "</s>", "<pad>", *WORDS]
    words = Tokenizer(WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


if __name__ == "__main__":
    main()
