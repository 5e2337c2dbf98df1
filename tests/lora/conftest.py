"""Base models, adapters saved by PEFT, and the results of training them with PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.config.lora import PROJECTIONS
from megatron_idpo.testing import write_tiny_hf_model

from .lora_case import ADAM, AS_MODULES, CLIP, MODELS, SETTINGS, STEPS, tokens


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny base model by its name in `MODELS`; tests must not modify it."""
    directories: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in directories:
            family, overrides = MODELS[model]
            directories[model] = tmp_path_factory.mktemp(model)
            write_tiny_hf_model(directories[model], family, seed=3, **overrides)
        return directories[model]

    return make


@pytest.fixture(scope="session")
def peft_adapter(base_model, tmp_path_factory) -> Callable[[str, str], Path]:
    """The directory of an adapter with random A and B, by model and `SETTINGS`."""
    directories: dict[tuple[str, str], Path] = {}

    def make(model: str, settings: str = "all") -> Path:
        if (model, settings) not in directories:
            directories[model, settings] = tmp_path_factory.mktemp(f"{model}-{settings}")
            fresh_peft(base_model(model), settings).save_pretrained(directories[model, settings])
        return directories[model, settings]

    return make


def hf_model(directory: Path) -> Any:
    """A model as Transformers loads it, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def fresh_peft(base: Path, settings: str) -> Any:
    """A PEFT model with random A and B."""
    from peft import LoraConfig, get_peft_model

    lora = SETTINGS[settings]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        target_modules=list(PROJECTIONS if settings in AS_MODULES else lora.projections),
        target_parameters=None if settings in AS_MODULES else list(lora.expert_parameters) or None,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        model = get_peft_model(hf_model(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def peft_result(base_model, peft_adapter) -> Callable[[str, str], dict[str, Any]]:
    """Logits, gradients and norms of training with PEFT and torch, and the trained adapters."""
    known: dict[tuple[str, str], dict[str, Any]] = {}

    def compute(model: str, settings: str) -> dict[str, Any]:
        if (model, settings) not in known:
            adapter = peft_adapter(model, settings)
            known[model, settings] = _trained_by_peft(base_model(model), adapter)
        return known[model, settings]

    return compute


def _trained_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(hf_model(base), adapter, is_trainable=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), **ADAM)
    result: dict[str, Any] = {"norms": []}
    for step in range(STEPS):
        batch = tokens(model.config.vocab_size, step)
        logits = model(batch[:, :-1]).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        if step == 0:
            result["logits"] = logits.detach()
            result["gradients"] = {_file_name(n): p.grad.clone() for n, p in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        result["norms"].append(float(norm))
        optimizer.step()
    return result | {"adapters": {_file_name(n): p.detach().clone() for n, p in trained.items()}}


def _file_name(name: str) -> str:
    """A parameter's name as PEFT writes it into files."""
    return name.replace(".default", "")
