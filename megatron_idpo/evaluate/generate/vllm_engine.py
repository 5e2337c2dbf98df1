"""Generation with vLLM, which schedules its batches itself; much faster on a GPU.

Each prompt has its own seed, so samples do not depend on which prompts are generated together. vLLM
receives and returns token ids and needs no tokenizer. It is imported when an engine is created.
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
"""Values that vLLM accepts as `max_lora_rank`."""


class VllmEngine:
    """A vLLM model on one GPU; see `engine.Engine`."""

    def __init__(
        self,
        weights: Weights,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        longest_prompt_tokens: int,
    ) -> None:
        """Loads the model, with a context for the longest prompt and its answer.

        Raises:
            ConfigError: the adapter's rank is higher than vLLM supports.
        """
        vllm = import_module("vllm")
        options: dict[str, Any] = {}
        self._lora: dict[str, Any] = {}
        if weights.adapter is not None:
            options = {"enable_lora": True, "max_lora_rank": _max_lora_rank(weights)}
            request = import_module("vllm.lora.request").LoRARequest
            self._lora = {"lora_request": request("adapter", 1, str(weights.adapter))}
        self._sampling = sampling
        self._stop_tokens = list(stop_tokens)
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(weights.directory),
            dtype=_DTYPES[weights.dtype],
            skip_tokenizer_init=True,
            # The default, "auto", would add the model's own defaults, such as a top_k.
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
                seed=derived_seed(sampling.seed, first + offset),
                stop_token_ids=self._stop_tokens,
                detokenize=False,
            )
            for offset in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False, **self._lora)
        return [self._tokens(output.outputs[0]) for output in outputs]

    def _tokens(self, output: Any) -> list[int]:
        """Token ids of an answer including its stop token, which vLLM may have removed."""
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


def _max_lora_rank(weights: Weights) -> int:
    """The smallest supported rank that holds the adapter.

    Raises:
        ConfigError: there is none.
    """
    assert weights.adapter is not None
    rank = int(read_json_object(weights.adapter / "adapter_config.json").get("r", 8))
    if rank > _LORA_RANKS[-1]:
        message = f"the adapter has rank {rank}, vLLM supports at most {_LORA_RANKS[-1]}"
        raise ConfigError.at(str(weights.adapter), message, "set generate.engine to transformers")
    return next(supported for supported in _LORA_RANKS if supported >= rank)
