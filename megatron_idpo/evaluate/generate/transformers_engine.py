"""Answers by Transformers' `generate`, on the GPU or the CPU, with a PEFT adapter if there is one.

Prompts of a batch are padded on the left. Padding has no influence: it is masked out of attention,
positions are counted from the first token, and the repetition penalty does not see it (Transformers
would penalise the padding token, often EOS, in the shorter prompts of a batch only).

Shapes: B prompts of a batch, T tokens so far with padding, V the vocabulary.
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

from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.evaluate.counting import counted
from megatron_idpo.evaluate.generate.engine import Sampling, Weights, derived_seed
from megatron_idpo.evaluate.hf_progress import without_bar

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_APART = ("vblora_vector_bank", "prompt_encoder", "prompt_embeddings")
"""Parts of names that PEFT saves in another way than it holds them."""


class TransformersEngine:
    """A model of Transformers; see `engine.Engine`."""

    def __init__(self, weights: Weights, sampling: Sampling, stop_tokens: Sequence[int]) -> None:
        """Load the model.

        Raises:
            CheckpointError: it cannot be loaded, weights are missing, or an adapter is of another
                model.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(weights, self._device)
        self._place = str(weights.directory)
        self._sampling = sampling
        self._pad_token = stop_tokens[0] if stop_tokens else 0
        self._config = _generation_config(sampling, stop_tokens, self._pad_token)

    def answer(self, first: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """See `Engine.answer`.

        Raises:
            CheckpointError: the model's output is no number.
            ConfigError: the GPU's memory does not suffice.
        """
        longest = max(map(len, prompts))
        tokens_BT = torch.full((len(prompts), longest), self._pad_token)
        is_token_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            is_token_BT[row, longest - len(prompt) :] = 1
        scores = PaddedScores(
            is_token_BT.to(self._device), self._sampling.repetition_penalty, self._place
        )
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(derived_seed(self._sampling.seed, first))
            try:
                out_BT = self._model.generate(
                    input_ids=tokens_BT.to(self._device),
                    attention_mask=is_token_BT.to(self._device),
                    generation_config=self._config,
                    logits_processor=LogitsProcessorList([scores]),
                )
            except torch.OutOfMemoryError:
                message = f"the GPU's memory does not suffice for {len(prompts)} prompts at once"
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


class PaddedScores(LogitsProcessor):
    """The repetition penalty without padding, and a check that scores are numbers."""

    def __init__(self, is_token_BT: Tensor, penalty: float, location: str) -> None:
        """Args: 0 where the prompts are padded; the penalty; the model's name for messages."""
        self._is_padding_BT = is_token_BT == 0
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
        self._place = location

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token [B, V] after the tokens so far [B, T].

        Raises:
            CheckpointError: a score is NaN or infinite, or no token is possible.
        """
        best_B = scores.amax(dim=-1)  # NaN if there is one; single scores may be -inf
        if not bool(best_B.isfinite().all()):
            kind = "NaN" if bool(best_B.isnan().any()) else "infinite"
            message = f"the model's output is no number ({kind})"
            raise CheckpointError.at(self._place, message, "set model.dtype to bf16 or fp32")
        if self._penalty is None:
            return scores
        # The penalty counts a token once, so the last one, which is never padding, can stand there.
        tokens_BT = input_ids.clone()
        prompt_BT = tokens_BT[:, : self._is_padding_BT.shape[1]]
        prompt_BT[...] = torch.where(self._is_padding_BT, input_ids[:, -1:], prompt_BT)
        penalised: Tensor = self._penalty(tokens_BT, scores)
        return penalised


def _generation_config(
    sampling: Sampling, stop_tokens: Sequence[int], pad_token: int
) -> GenerationConfig:
    """Everything said, so that nothing is left to defaults."""
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    return GenerationConfig(
        **drawn,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stop_tokens) or None,
        pad_token_id=pad_token,
        num_beams=1,
        use_cache=True,
    )


def _load(weights: Weights, device: torch.device) -> Any:
    """The model, every weight of it read.

    Raises:
        CheckpointError: it cannot be loaded, weights are missing, or an adapter is of another
            model.
    """
    location = str(weights.directory)
    try:
        with without_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                weights.directory,
                dtype=_DTYPES[weights.dtype],
                local_files_only=True,
                output_loading_info=True,
            )
        # `generate` would fill what is unset from the model's own, a top_k nobody asked for, say.
        model.generation_config = GenerationConfig()
    # The library raises whatever the file at hand leads to.
    except Exception as error:
        message = f"cannot be loaded: {type(error).__name__}: {error}"
        raise CheckpointError.at(
            location, message, "name a causal language model's directory"
        ) from error
    if missing := sorted(info["missing_keys"]):
        message = f"lacks {counted(len(missing), 'weight')}, {missing[0]} for one"
        raise CheckpointError.at(location, message, "name a complete model's directory")
    if weights.adapter is not None:
        model = _with_adapter(model, weights.adapter)
    return model.eval().to(device)


def _with_adapter(model: Any, directory: Path) -> Any:
    """The model with an adapter that has a tensor for every place, and none besides.

    Raises:
        CheckpointError: it cannot be loaded, or is of another model.
    """
    from peft import PeftModel

    location, remedy = str(directory), "name the model that the adapter was trained on"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
            model = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
        # Only loading it again says which names did not fit.
        found = model.load_adapter(directory, model.active_adapter, autocast_adapter_dtype=False)
    except Exception as error:  # likewise
        message = f"cannot be loaded: {type(error).__name__}: {error}"
        raise CheckpointError.at(location, message, remedy) from error
    problems = []
    kinds = {"lacks {}": found.missing_keys, "has {} too many": found.unexpected_keys}
    for what, keys in kinds.items():
        names = [
            key.replace(f".{model.active_adapter}", "")
            for key in keys
            if not any(part in key for part in _APART)
        ]
        if names:
            more = ", ..." if len(names) > 2 else ""
            number = what.format(counted(len(names), "tensor"))
            problems.append(f"{number}: {', '.join(names[:2])}{more}")
    if problems:
        raise CheckpointError.at(location, "; ".join(problems), remedy)
    return model
