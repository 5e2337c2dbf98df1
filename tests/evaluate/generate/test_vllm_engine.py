"""The vLLM engine with a fake `vllm` module that records its calls; vLLM itself needs a GPU."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_idpo.config.evaluate import GenerateConfig
from megatron_idpo.evaluate.generate.engine import derived_seed
from megatron_idpo.evaluate.generate.models import InspectedModel
from megatron_idpo.evaluate.generate.vllm_engine import VllmEngine

from .tiny_answers import engine_task

SAMPLING = GenerateConfig(temperature=0.3, repetition_penalty=1.1, top_p=0.9, max_new_tokens=5)


@dataclass
class FakeVllm:
    """Recorded calls."""

    options: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)


def answer(prompt: list[int]) -> SimpleNamespace:
    """The reversed prompt; one that contains 9 ends with a stop token."""
    reason = "stop" if 9 in prompt else "length"
    return SimpleNamespace(token_ids=tuple(prompt[::-1]), finish_reason=reason)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    """A module `vllm` whose model answers a prompt with its reversed tokens."""
    calls = FakeVllm()

    class LLM:
        def __init__(self, **options: Any) -> None:
            calls.options = options

        def generate(self, prompts: Any, params: Any, **more: Any) -> list[Any]:
            calls.calls.append((prompts, params, more))
            return [SimpleNamespace(outputs=[answer(p["prompt_token_ids"])]) for p in prompts]

    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **fields: fields
    request: Any = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *fields: fields
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    return calls


def engine(adapter: Path | None = None) -> VllmEngine:
    model = InspectedModel("m", Path("model"), adapter, torch.bfloat16, 100, 264, frozenset())
    return VllmEngine(engine_task(model, SAMPLING, stop_tokens=[1, 3], seed=3, prompts=[[4] * 20]))


def test_model_options(fake: FakeVllm) -> None:
    engine()
    assert fake.options == {
        "model": "model",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": 25,
        "seed": 3,
        "trust_remote_code": False,
    }


def test_each_prompt_has_its_tokens_and_seed(fake: FakeVllm) -> None:
    model = engine()
    assert model.answer(8, [[4, 5], [6]]) == [[5, 4], [6]]
    [(prompts, params, more)] = fake.calls
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


def test_the_stop_token_is_included_once(fake: FakeVllm) -> None:
    """Whether or not vLLM returns it."""
    assert engine().answer(0, [[9, 4], [3, 9, 4]]) == [[4, 9, 1], [4, 9, 3]]


@pytest.mark.parametrize(("rank", "max_rank"), [(4, 8), (8, 8), (17, 32), (300, 320), (1024, 1024)])
def test_an_adapter_is_part_of_every_request(
    fake: FakeVllm, tmp_path: Path, rank: int, max_rank: int
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    engine(tmp_path).answer(0, [[4]])
    assert (fake.options["enable_lora"], fake.options["max_lora_rank"]) == (True, max_rank)
    assert fake.calls[0][2]["lora_request"] == ("adapter", 1, str(tmp_path))
