"""TRL's side of `compare_trl.py`: its DPOTrainer, unchanged and with intermediate layers.

Plain DPO is TRL's own trainer. `IntermediateDpo` is the obvious extension: ask the model for all
hidden states, put the chosen ones through the final norm, score them as TRL scores the final layer
(its own `ChunkedLogProbFunction`, which never holds all logits), for the policy and for the
reference, and mix the losses as Eq. 3 does.

Settings in `Case.side`, with TRL's defaults where there is one: `micro_pairs` (pairs per device),
`checkpointing` (gradient checkpointing: TRL's default is on), `weights` (`case`: in the case's
dtype; `fp32`: TRL's default, which computes bf16 under autocast), `compact` (score answers only, as
TRL does where it has Triton, that is, not on a CPU).
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils
from trl_case import BETA, INTERMEDIATE_WEIGHT, SEED, TARGETS, Case, Clock, Measured, digest

VOCABULARY_TILE = 32768  # TRL's own, private there


def train(case: Case) -> Measured:
    """Train on all records of the case."""
    torch.set_num_threads(case.threads)
    side = {"micro_pairs": 4, "checkpointing": True, "weights": "case", "compact": False}
    side |= case.side
    if side["compact"]:
        trl_utils._use_triton = lambda device: True
    clock, seen = Clock(), Seen()
    with tempfile.TemporaryDirectory() as output:
        trainer = _trainer(case, side, output, [Timing(clock)])
        _load_adapter(trainer.model, case.adapter)
        trainer.data_collator = seen.watching(trainer.data_collator)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in entries]
    margins = [entry["rewards/margins"] for entry in entries] if not case.layers else []
    per_step = case.batch_pairs
    tokens = [
        digest(seen.pairs[first : first + per_step])
        for first in range(0, len(seen.pairs), per_step)
    ]
    return clock.measured(losses=losses, margins=margins, tokens=tokens, positions=seen.positions)


def _trainer(case: Case, side: dict[str, Any], output: str, callbacks: list[Any]) -> Any:
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_bf16 = case.dtype == "bf16"
    dtype = torch.bfloat16 if is_bf16 and side["weights"] == "case" else torch.float32
    kind = IntermediateDpo if case.layers else DPOTrainer
    trainer = kind(
        AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype, trust_remote_code=False),
        args=DPOConfig(
            output,
            beta=BETA,
            max_length=case.max_length,
            per_device_train_batch_size=side["micro_pairs"],
            gradient_accumulation_steps=case.batch_pairs // side["micro_pairs"],
            gradient_checkpointing=side["checkpointing"],
            bf16=is_bf16,
            use_cpu=True,
            learning_rate=case.lr,
            lr_scheduler_type="constant",
            num_train_epochs=case.epochs,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=load_dataset(
            "json", data_files=case.records, split="train", cache_dir=f"{output}/datasets"
        ),
        processing_class=AutoTokenizer.from_pretrained(case.model, trust_remote_code=False),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=case.rank,
            lora_alpha=case.rank,
            lora_dropout=0.0,
            target_modules=list(TARGETS),
        ),
        callbacks=callbacks,
    )
    trainer.intermediate_layers = case.layers
    return trainer


def _load_adapter(model: Any, directory: str) -> None:
    """Start from the same adapter as the other side."""
    from peft import load_peft_weights, set_peft_model_state_dict

    report = set_peft_model_state_dict(model, load_peft_weights(directory, device="cpu"))
    assert not report.unexpected_keys, report.unexpected_keys


class Timing(TrainerCallback):  # type: ignore[misc]
    """Reports steps to a clock."""

    def __init__(self, clock: Clock) -> None:
        """Store the clock."""
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock once everything is loaded."""
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the end of a step."""
        self._clock.step_done()


class Seen:
    """Records the batches of TRL's collator."""

    def __init__(self) -> None:
        """Start without batches."""
        self.pairs: list[tuple[list[int], list[int], list[int]]] = []
        self.positions = 0

    def watching(self, collator: Any) -> Any:
        """Wrap the collator."""

        def collate(examples: list[Any]) -> Any:
            batch = collator(examples)
            self.positions += batch["input_ids"].numel()
            sequences = [
                self._split(*(batch[name][row] for name in _WATCHED))
                for row in range(len(batch["input_ids"]))
            ]
            half = len(sequences) // 2
            for chosen, rejected in zip(sequences[:half], sequences[half:], strict=True):
                assert chosen[0] == rejected[0], "both sequences of a pair share the prompt"
                self.pairs.append((*chosen, rejected[1]))
            return batch

        return collate

    @staticmethod
    def _split(ids_T: Tensor, seen_T: Tensor, answer_T: Tensor) -> tuple[list[int], list[int]]:
        ids = ids_T[seen_T == 1].tolist()
        start = int(answer_T.argmax())
        return ids[:start], ids[start:]


_WATCHED = ("input_ids", "attention_mask", "completion_mask")


class IntermediateDpo(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer with Eq. 3's loss over `intermediate_layers`, counted from 1."""

    intermediate_layers: tuple[int, ...]

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        policy = self._logps(inputs)
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference = self._logps(inputs)
        losses = []
        for policy_S, reference_S in zip(policy, reference, strict=True):
            chosen_P, rejected_P = (policy_S - reference_S).chunk(2)
            losses.append(-logsigmoid(self.beta * (chosen_P - rejected_P)).mean())
        *intermediate, final = losses
        mean = torch.stack(intermediate).mean()
        return (1 - INTERMEDIATE_WEIGHT) * final + INTERMEDIATE_WEIGHT * mean

    def _logps(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Log-probabilities of the answers, `[2P]`, at each intermediate and the final layer."""
        language_model = self.accelerator.unwrap_model(self.model).get_base_model()
        backbone = language_model.model
        with self.accelerator.autocast():
            output = backbone(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                output_hidden_states=True,
            )
            hidden = [backbone.norm(output.hidden_states[n]) for n in self.intermediate_layers]
            hidden.append(output.last_hidden_state)
            return [
                _answer_logps(
                    hidden_STH, language_model.lm_head.weight, inputs, trl_utils._use_triton
                )
                for hidden_STH in hidden
            ]


def _answer_logps(
    hidden_STH: Tensor, weight_VH: Tensor, inputs: dict[str, Tensor], use_triton: Any
) -> Tensor:
    """Log-probabilities of sequences, `[S]`, computed as in TRL."""
    hidden_STH = hidden_STH[:, :-1]
    answer_ST = inputs["completion_mask"][:, 1:] == 1
    tokens_ST = inputs["input_ids"][:, 1:]
    compact = use_triton(hidden_STH.device)
    logps_N, *_ = ChunkedLogProbFunction.apply(
        hidden_STH[answer_ST] if compact else hidden_STH.flatten(0, 1),
        weight_VH,
        None,
        tokens_ST[answer_ST] if compact else tokens_ST.flatten(),
        1.0,
        VOCABULARY_TILE,
        None,
        1.0,
        ("log_probs",),
    )
    if compact:
        logps_ST = logps_N.new_zeros(answer_ST.shape).masked_scatter(answer_ST, logps_N)
    else:
        logps_ST = logps_N.view(answer_ST.shape) * answer_ST
    logps_S: Tensor = logps_ST.sum(1)
    return logps_S
