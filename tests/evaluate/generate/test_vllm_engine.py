"""vLLM as an engine, by a stand-in that notes what it is told: it needs a GPU to run."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.engine import Sampling, Weights, derived_seed
from megatron_idpo.evaluate.generate.vllm_engine import VllmEngine

SAMPLING = Sampling(temperature=0.3, repetition_penalty=1.1, top_p=0.9, max_new_tokens=5, seed=3)


@dataclass
class Stand:
    """What the stand-in was told."""

    options: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)


def answer(prompt: list[int]) -> SimpleNamespace:
    """The prompt backwards; with 9 in it, the model ends it there."""
    reason = "stop" if 9 in prompt else "length"
    return SimpleNamespace(token_ids=tuple(prompt[::-1]), finish_reason=reason)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """A module `vllm` whose model answers a prompt by its tokens backwards."""
    noted = Stand()

    class LLM:
        def __init__(self, **options: Any) -> None:
            noted.options = options

        def generate(self, prompts: Any, params: Any, **more: Any) -> list[Any]:
            noted.calls.append((prompts, params, more))
            return [SimpleNamespace(outputs=[answer(p["prompt_token_ids"])]) for p in prompts]

    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **fields: fields
    request: Any = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *fields: fields
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return noted


def engine(adapter: Path | None = None) -> VllmEngine:
    weights = Weights(Path("model"), adapter, "bf16")
    return VllmEngine(weights, SAMPLING, [1, 3], longest_prompt_tokens=20)


def test_the_model_is_loaded_as_the_configuration_says(stand: Stand) -> None:
    engine()
    assert stand.options == {
        "model": "model",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": 25,
        "seed": 3,
    }


def test_every_prompt_has_its_tokens_and_its_seed(stand: Stand) -> None:
    model = engine()
    assert model.answer(8, [[4, 5], [6]]) == [[5, 4], [6]]
    [(prompts, params, more)] = stand.calls
    assert prompts == [{"prompt_token_ids": [4, 5]}, {"prompt_token_ids": [6]}]
    assert [one["seed"] for one in params] == [derived_seed(3, 8), derived_seed(3, 9)]
    del params[0]["seed"]
    assert params[0] == {
        "temperature": 0.3,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "max_tokens": 5,
        "stop_token_ids": [1, 3],
        "detokenize": False,
    }
    assert more == {"use_tqdm": False}
    model.close()


def test_the_end_of_an_answer_is_there_once(stand: Stand) -> None:
    """Whether or not vLLM returns the token that ended it."""
    assert engine().answer(0, [[9, 4], [3, 9, 4]]) == [[4, 9, 1], [4, 9, 3]]


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (8, 8), (17, 32), (300, 320)])
def test_an_adapter_goes_with_every_request(
    stand: Stand, tmp_path: Path, rank: int, room: int
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    engine(tmp_path).answer(0, [[4]])
    assert (stand.options["enable_lora"], stand.options["max_lora_rank"]) == (True, room)
    assert stand.calls[0][2]["lora_request"] == ("adapter", 1, str(tmp_path))


def test_an_adapter_that_vllm_cannot_hold_is_refused(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1024}))
    with pytest.raises(ConfigError, match=r"rank 1024.*set generate\.engine to transformers"):
        engine(tmp_path)
