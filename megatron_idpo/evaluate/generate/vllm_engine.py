"""Generation with vLLM, which schedules its batches itself; much faster on a GPU.

Each prompt has its own seed, so samples do not depend on which prompts are generated together. vLLM
receives and returns token ids and needs no tokenizer. It is imported when an engine is created.
"""

import gc
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_idpo.convert.hf_io.tokenizer_files import read_json_object
from megatron_idpo.evaluate.generate.engine import derived_seed
from megatron_idpo.evaluate.generate.models import Task
from megatron_idpo.evaluate.hf_model import check_weights

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as `max_lora_rank`."""


class VllmEngine:
    """A vLLM model on one GPU; see `engine.Engine`."""

    def __init__(self, task: Task) -> None:
        """Loads the model, with a context for the longest prompt and its answer.

        Raises:
            CheckpointError: weights of an export have been changed.
        """
        for directory in filter(None, (task.model.directory, task.model.adapter)):
            check_weights(directory)
        vllm = import_module("vllm")
        options: dict[str, Any] = {}
        self._lora: dict[str, Any] = {}
        if task.model.adapter is not None:
            options = {"enable_lora": True, "max_lora_rank": _max_lora_rank(task.model.adapter)}
            request = import_module("vllm.lora.request").LoRARequest
            self._lora = {"lora_request": request("adapter", 1, str(task.model.adapter))}
        self._task = task
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(task.model.directory),
            dtype=str(task.model.dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            # The default, "auto", would add the model's own defaults, such as a top_k.
            generation_config="vllm",
            max_model_len=max(map(len, task.prompts)) + task.sampling.max_new_tokens,
            seed=task.seed,
            **options,
        )

    def answer(self, first: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """See `Engine.answer`."""
        sampling = self._task.sampling
        params = [
            self._params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_new_tokens,
                seed=derived_seed(self._task.seed, first + offset),
                stop_token_ids=list(self._task.stop_tokens),
                detokenize=False,
            )
            for offset in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False, **self._lora)
        return [self._tokens(output.outputs[0]) for output in outputs]

    def _tokens(self, output: Any) -> list[int]:
        """Token ids of an answer including its stop token, which vLLM may have removed."""
        tokens, stops = list(output.token_ids), self._task.stop_tokens
        if stops and output.finish_reason == "stop" and (not tokens or tokens[-1] not in stops):
            tokens.append(stops[0])
        return tokens

    def close(self) -> None:
        """See `Engine.close`."""
        import torch

        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _max_lora_rank(adapter: Path) -> int:
    """The smallest supported value that holds the adapter's rank; vLLM refuses higher ranks."""
    rank = int(read_json_object(adapter / "adapter_config.json").get("r", 8))
    return next((supported for supported in _LORA_RANKS if supported >= rank), rank)
