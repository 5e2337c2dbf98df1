"""TRL's DPOTrainer on given records, in a separate process: the reference of the parity tests.

The process is separate because TRL seeds every generator, sets up accelerate and patches
Transformers' models; it is a fork of a worker, which has imported torch and Transformers. It runs
all runs because importing TRL takes longer than they do.

Nothing from this package is called, so that a bug here cannot be on both sides.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from .trl_losses import losses_of_trl

TIMEOUT_S = 900.0
"""Half a minute of work, on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class TrlRun:
    """One run of TRL's trainer; everything else is TRL's default."""

    model: str
    """A Hugging Face directory with its tokenizer."""

    records: str
    """A jsonl file; records are met in its order, each once."""

    output: str
    """Directory that the run may fill; `adapter` in it is the initial PEFT adapter."""

    chat_template: str | None
    max_length: int
    batch_pairs: int
    micro_pairs: int
    lora: dict[str, Any] | None
    """Arguments of PEFT's LoraConfig, or None to train all weights."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    """Further arguments of DPOConfig: learning rate, schedule, warm-up, Adam's numbers, beta."""


@dataclass(frozen=True)
class TrlResult:
    """Result of a run."""

    logs: list[dict[str, float]]
    """Per optimizer step, everything TRL logged."""

    pairs: list[tuple[list[int], list[int], list[int]]]
    """Per pair met, the tokens of prompt, chosen and rejected that the model was given."""


def run_trl(runs: list[TrlRun]) -> tuple[list[TrlResult], list[dict[str, Any]]]:
    """Run them one after the other, offline; for `WorkerPool.run_as_program`.

    Returns:
        The result of each run, and of each case of `trl_losses.losses_of_trl`.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return [_train(run) for run in runs], losses_of_trl()


def _train(run: TrlRun) -> TrlResult:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    logs: list[dict[str, float]] = []
    pairs: list[tuple[list[int], list[int], list[int]]] = []

    class Recording(DPOTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            pairs.extend(_pairs_of(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

        def log(self, values, *args, **kwargs):
            super().log(values, *args, **kwargs)
            if "loss" in values:
                logs.append(dict(values))

    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if run.chat_template is not None:
        tokenizer.chat_template = run.chat_template
    trainer = Recording(
        AutoModelForCausalLM.from_pretrained(run.model, dtype="float32"),
        args=DPOConfig(
            run.output,
            max_length=run.max_length,
            per_device_train_batch_size=run.micro_pairs,
            gradient_accumulation_steps=run.batch_pairs // run.micro_pairs,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            dataloader_drop_last=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **run.optimizer,
        ),
        train_dataset=load_dataset(
            "json", data_files=run.records, split="train", cache_dir=f"{run.output}/datasets"
        ),
        processing_class=tokenizer,
        peft_config=None if run.lora is None else LoraConfig(task_type="CAUSAL_LM", **run.lora),
    )
    if run.lora is not None:
        trainer.model.save_pretrained(f"{run.output}/adapter")
    trainer.train()
    return TrlResult(logs, pairs)


def _pairs_of(inputs: dict[str, Any]) -> list[tuple[list[int], list[int], list[int]]]:
    """The pairs of TRL's padded batch [2P, T]: all chosen first, then all rejected."""
    sequences = []
    for ids, seen, answer in zip(
        *(inputs[name].tolist() for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        length, start = sum(seen), answer.index(1)
        assert seen == [1] * length + [0] * (len(seen) - length), "padding is on the right"
        assert answer[start:length] == [1] * (length - start), "an answer is one piece"
        sequences.append((ids[:start], ids[start:length]))
    half = len(sequences) // 2
    pairs = []
    for (prompt, chosen), (same_prompt, rejected) in zip(
        sequences[:half], sequences[half:], strict=True
    ):
        assert prompt == same_prompt, "both sequences of a pair share the prompt"
        pairs.append((prompt, chosen, rejected))
    return pairs
