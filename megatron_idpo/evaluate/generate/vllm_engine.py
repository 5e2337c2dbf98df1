"""Answers by vLLM, which forms its batches by itself: far faster on a GPU.

Every prompt has a seed of its own, so which prompts are answered together does not decide what is
drawn. vLLM gets tokens and returns tokens, and needs no tokenizer. Nothing of `vllm` is imported
before an engine is made.
"""

import gc
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from megatron_idpo.convert.hf_io.tokenizer_files import read_json_object
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.engine import Sampling, Weights, derived_seed

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for."""


class VllmEngine:
    """A model of vLLM on one GPU; see `engine.Engine`."""

    def __init__(
        self,
        weights: Weights,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        longest_prompt_tokens: int,
    ) -> None:
        """Load the model, with room for the longest prompt and its answer.

        Raises:
            ConfigError: the adapter's rank is more than vLLM can hold.
        """
        vllm = import_module("vllm")
        options: dict[str, Any] = {}
        self._lora: dict[str, Any] = {}
        if weights.adapter is not None:
            options = {"enable_lora": True, "max_lora_rank": _lora_rank(weights)}
            request = import_module("vllm.lora.request").LoRARequest
            self._lora = {"lora_request": request("adapter", 1, str(weights.adapter))}
        self._sampling = sampling
        self._stop_tokens = list(stop_tokens)
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(weights.directory),
            dtype=_DTYPES[weights.dtype],
            skip_tokenizer_init=True,
            # Else the model's own defaults, such as a top_k, would be added to ours.
            generation_config="vllm",
            max_model_len=longest_prompt_tokens + sampling.max_new_tokens,
            seed=sampling.seed,
            **options,
        )

    def answer(self, first: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """See `Engine.answer`."""
        sampling = self._sampling
        params = [
            self._params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_new_tokens,
                seed=derived_seed(sampling.seed, first + location),
                stop_token_ids=self._stop_tokens,
                detokenize=False,
            )
            for location in range(len(prompts))
        ]
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(given, params, use_tqdm=False, **self._lora)
        return [self._tokens(output.outputs[0]) for output in outputs]

    def _tokens(self, output: Any) -> list[int]:
        """An answer's tokens with the one that ended it, which vLLM may have taken off."""
        tokens = list(output.token_ids)
        if output.finish_reason == "stop" and tokens[-1:] not in [[t] for t in self._stop_tokens]:
            tokens.append(self._stop_tokens[0])
        return tokens

    def close(self) -> None:
        """See `Engine.close`."""
        import torch

        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _lora_rank(weights: Weights) -> int:
    """The least room that holds the adapter.

    Raises:
        ConfigError: there is none.
    """
    assert weights.adapter is not None
    rank = int(read_json_object(weights.adapter / "adapter_config.json").get("r", 8))
    if rank > _LORA_RANKS[-1]:
        message = f"the adapter has rank {rank}, and vLLM holds {_LORA_RANKS[-1]} at most"
        raise ConfigError.at(str(weights.adapter), message, "set generate.engine to transformers")
    return next(room for room in _LORA_RANKS if room >= rank)
