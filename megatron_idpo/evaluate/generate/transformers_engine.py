"""Generation with Transformers, on the GPU or the CPU, with or without a PEFT adapter.

Prompts of a batch are padded on the left, and padding has no influence: attention masks it,
positions start at the first token, and the repetition penalty ignores it (Transformers itself would
penalize the padding token, often EOS, in the shorter prompts of a batch).

Shapes: B prompts of a batch, T tokens so far including padding, V vocabulary.
"""

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from megatron_idpo.console.text import format_count
from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.evaluate.generate.engine import derived_seed
from megatron_idpo.evaluate.generate.models import InspectedModel, Task
from megatron_idpo.evaluate.hf_model import check_weights, load_hf_model


class TransformersEngine:
    """A Transformers model; see `engine.Engine`."""

    def __init__(self, task: Task) -> None:
        """Loads the model.

        Raises:
            CheckpointError: it cannot be loaded, weights are missing, or the adapter belongs to
                another model.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(task.model).eval().to(self._device)
        self._location = str(task.model.directory)
        self._sampling = sampling = task.sampling
        self._seed = task.seed
        self._pad_token = task.stop_tokens[0] if task.stop_tokens else 0
        is_sampled = sampling.temperature > 0
        # Every parameter that has a default is set: nothing is left to Transformers' defaults.
        self._config = GenerationConfig(
            do_sample=is_sampled,
            temperature=sampling.temperature if is_sampled else None,
            top_p=sampling.top_p if is_sampled else None,
            top_k=0 if is_sampled else None,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(task.stop_tokens) or None,
            pad_token_id=self._pad_token,
            num_beams=1,
            use_cache=True,
        )

    def answer(self, first: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """See `Engine.answer`.

        Raises:
            CheckpointError: the model's output is NaN or infinite.
            ConfigError: the GPU runs out of memory.
        """
        longest = max(map(len, prompts))
        tokens_BT = torch.full((len(prompts), longest), self._pad_token)
        is_token_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            is_token_BT[row, longest - len(prompt) :] = 1
        processor = PaddingAwareScores(
            is_token_BT.to(self._device), self._sampling.repetition_penalty, self._location
        )
        devices = [self._device] if self._device.type == "cuda" else []
        # The batch has its own seed, and the random state of the process stays as it is.
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(derived_seed(self._seed, first))
            try:
                out_BT = self._model.generate(
                    input_ids=tokens_BT.to(self._device),
                    attention_mask=is_token_BT.to(self._device),
                    generation_config=self._config,
                    logits_processor=LogitsProcessorList([processor]),
                )
            except torch.OutOfMemoryError:
                message = f"out of GPU memory with {len(prompts)} prompts per batch"
                remedy = "lower it, or generate.max_new_tokens"
                raise ConfigError.at("generate.batch_prompts", message, remedy) from None
        answers: list[list[int]] = out_BT[:, longest:].tolist()
        return answers

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class PaddingAwareScores(LogitsProcessor):
    """Repetition penalty that ignores padding, and a check for NaN and infinite scores."""

    def __init__(self, is_token_BT: Tensor, penalty: float, location: str) -> None:
        """Args: 0 where the prompts are padded; the penalty, 1 for none; location of errors."""
        self._is_padding_BT = is_token_BT == 0
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
        self._location = location

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Processes the scores of the next token [B, V] after the tokens so far [B, T].

        Raises:
            CheckpointError: a score is NaN or infinite, or all are -inf.
        """
        # amax is NaN if any score is. Single scores may be -inf (ruled out), but not the best one.
        best_B = scores.amax(dim=-1)
        if not bool(best_B.isfinite().all()):
            kind = "NaN" if bool(best_B.isnan().any()) else "infinite"
            message = f"the model's output is {kind}"
            raise CheckpointError.at(self._location, message, "set model.dtype to bf16 or fp32")
        if self._penalty is None:
            return scores
        # The penalty counts each token once. So replacing the padding by the last token, which is
        # never padding, removes the padding token and changes nothing else.
        tokens_BT = input_ids.clone()
        prompt_BT = tokens_BT[:, : self._is_padding_BT.shape[1]]
        prompt_BT[...] = torch.where(self._is_padding_BT, input_ids[:, -1:], prompt_BT)
        penalized: Tensor = self._penalty(tokens_BT, scores)
        return penalized


def _load(model: InspectedModel) -> Any:
    """The model with its adapter.

    Raises:
        CheckpointError: it cannot be loaded, weights are missing, or the adapter belongs to another
            model.
    """
    loaded = load_hf_model(
        AutoModelForCausalLM,
        str(model.directory),
        location=str(model.directory),
        remedy="name the complete directory of a causal language model",
        dtype=model.dtype,
        local_files_only=True,
    )
    # `generate` fills unset parameters from the model's generation config, a top_k for example.
    loaded.generation_config = GenerationConfig()
    return loaded if model.adapter is None else _with_adapter(loaded, model.adapter)


def _with_adapter(model: Any, directory: Path) -> Any:
    """The model with an adapter whose tensors all fit, none missing and none left over.

    Raises:
        CheckpointError: it cannot be loaded, or belongs to another model.
    """
    from peft import PeftModel

    check_weights(directory)
    location, remedy = str(directory), "name the model that the adapter was trained on"
    try:
        with warnings.catch_warnings():
            # PEFT only warns of tensors that the adapter lacks.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
        # `from_pretrained` does not return which names did not fit; loading again does.
        keys = model.load_adapter(directory, model.active_adapter, autocast_adapter_dtype=False)
    except Exception as error:  # as in `load_hf_model`: almost any type
        message = f"cannot be loaded: {type(error).__name__}: {error}"
        raise CheckpointError.at(location, message, remedy) from error
    # Other kinds of adapters save some tensors under another name than they load them.
    if names := [name for name in keys.unexpected_keys if ".lora_" in name]:
        message = f"has {format_count(len(names), 'tensor')} for other layers, first {names[0]}"
        raise CheckpointError.at(location, message, remedy)
    return model
