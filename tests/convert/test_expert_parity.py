"""Experts in every layout equal Transformers: logits, gradients, weights after an optimizer step.

The same comparison as `test_parity.py`, over expert, tensor, expert-tensor, pipeline and sequence
parallelism, and round trips through files.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import CheckpointError
from megatron_idpo.testing import write_tiny_hf_model

from .test_parity import (
    ADAM,
    STEP_IN_LR,
    Case,
    _assert_same_logits_and_gradients,
    _merged,
    _transformers_results,
    megatron_results,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"tie_word_embeddings": False}),
    "mixtral-window": ("mixtral", {"sliding_window": 5}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-plain-weights": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3-moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    # A shared expert, and a dense layer.
    "qwen2-moe": ("qwen2_moe", {}),
}
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def stored_names(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Transformers' parameters under the names of its files: one tensor per expert."""
    parent, gate, up, down = NAMES[family]
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matched = re.fullmatch(r"(model\.layers\.\d+\.)mlp\.(experts\.\w+|gate\.weight)", name)
        if not matched:
            named[name] = tensor
        elif matched[2] == "gate.weight":
            named[f"{matched[1]}{parent}.gate.weight"] = tensor
        else:
            for expert, matrix in enumerate(tensor):
                prefix = f"{matched[1]}{parent}.experts.{expert}."
                if "gate_up" in name:
                    first, second = matrix.chunk(2)
                    named |= {f"{prefix}{gate}.weight": first, f"{prefix}{up}.weight": second}
                else:
                    named[f"{prefix}{down}.weight"] = matrix
    return named


def _cases() -> dict[str, Case]:
    cases = {}
    for expert in (1, 2, 4):
        for tensor in (1, 2):
            for pipeline in (1, 2):
                for expert_tensor in (None, 1) if tensor > 1 else (None,):
                    layout = Layout(
                        expert=expert,
                        tensor=tensor,
                        pipeline=pipeline,
                        sequence_parallel=tensor > 1,
                        expert_tensor=expert_tensor,
                    )
                    world = max(layout.model_ranks, layout.expert_model_ranks)
                    name = f"EP{expert}-TP{tensor}-PP{pipeline}"
                    if world > 8:
                        continue
                    cases[f"{name}-ETP1" if expert_tensor else name] = Case(layout, world)
    cases["EP2-DP4"] = Case(Layout(expert=2), 4)
    cases["EP2-DP4-distopt"] = Case(Layout(expert=2), 4, distributed_optimizer=True)
    return cases


CASES = _cases()
IN_MAKE_TEST = {
    "EP1-TP1-PP1": "mixtral-window",
    "EP2-TP2-PP1-ETP1": "qwen2-moe",
    "EP2-TP1-PP2": "qwen3-moe-every-second",
}
"""With them every dimension is split, and both shardings of an expert."""


def _params() -> list[Any]:
    return [
        pytest.param(
            case,
            model,
            id=f"{case}-{model}",
            marks=[] if IN_MAKE_TEST.get(case) == model else [pytest.mark.exhaustive],
        )
        for index, case in enumerate(CASES)
        for number, model in enumerate(MODELS)
        if IN_MAKE_TEST.get(case) == model or (index + number) % 2 == 0
    ]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model)
            family, overrides = MODELS[model]
            write_tiny_hf_model(made[model], family, seed=3, **overrides)
        return made[model]

    return make


@pytest.fixture(scope="session")
def expected(model_directory):
    known: dict[str, dict[str, Any]] = {}

    def compute(model: str) -> dict[str, Any]:
        if model not in known:
            family = MODELS[model][0]
            results = _transformers_results(model_directory(model))
            for kind in ("gradients", "weights"):
                results[kind] = stored_names(results[kind], family)
            known[model] = results
        return known[model]

    return compute


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "model"), _params())
def test_layout_equals_transformers(case, model, workers, model_directory, expected):
    directory, case = model_directory(model), CASES[case]
    answers = workers.run(megatron_results, case.world_size, str(directory), case)
    truth = expected(model)
    _assert_same_logits_and_gradients(case, answers, truth)
    weights = _merged(answers, "weights")
    assert set(weights) == set(truth["weights"])
    for name, weight in truth["weights"].items():
        moved = (weights[name] - weight).abs().max()
        assert moved <= STEP_IN_LR * ADAM["lr"], f"{name}: {moved / ADAM['lr']:.2e} lr"


# ---- files ---------------------------------------------------------------------------------------


def there_and_back(hf: str, megatron: str, back: str, first: Layout, second: Layout) -> None:
    from megatron_idpo.convert import hf_to_megatron, megatron_to_hf

    hf_to_megatron.convert(Path(hf), Path(megatron), layout=first)
    megatron_to_hf.convert(Path(megatron), Path(back), layout=second)


ROUND_TRIPS = {
    "EP2-PP2 to TP2": ("qwen2-moe", Layout(expert=2, pipeline=2), Layout(tensor=2), 4),
    "EP2 to TP2-PP2": ("mixtral", Layout(expert=2), Layout(tensor=2, pipeline=2), 4),
    "EP4-TP2-ETP1 to EP2-PP2": (
        "qwen3-moe",
        Layout(expert=4, tensor=2, expert_tensor=1, sequence_parallel=True),
        Layout(expert=2, pipeline=2),
        4,
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_saved_in_one_layout_and_exported_from_another_is_byte_identical(
    name, workers, model_directory, tmp_path
):
    model, first, second, world = ROUND_TRIPS[name]
    if second.tensor > 1:
        second = second.model_copy(update={"sequence_parallel": True})
    hf = model_directory(model)
    back = tmp_path / "back"
    workers.run(there_and_back, world, str(hf), str(tmp_path / "m"), str(back), first, second)
    before, after = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    assert json.loads((hf / "config.json").read_text()) == json.loads(
        (back / "config.json").read_text()
    )


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe"])
def test_fused_experts_are_read_like_separate_ones(model, model_directory, tmp_path):
    from transformers import AutoModelForCausalLM

    from megatron_idpo.convert.hf_to_megatron import open_hf

    separate, _ = open_hf(model_directory(model))
    state = AutoModelForCausalLM.from_pretrained(model_directory(model)).state_dict()
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    shutil.copy(model_directory(model) / "config.json", tmp_path)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    fused, _ = open_hf(tmp_path)
    assert fused.names() == separate.names()
    for name in separate.names():
        assert torch.equal(fused.read(name), separate.read(name)), name
        if len(separate.shape(name)) == 2:
            cuts = (slice(1, 4), slice(2, 9))
            assert torch.equal(fused.read(name, *cuts), separate.read(name, *cuts)), name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 128, 32), r"gate_up_proj' has shape \(4, 128, 32\), expected"),
        (None, r"experts\.0\.w1\.weight' is stored twice: alone, and in .*gate_up_proj'"),
    ],
)
def test_fused_experts_that_do_not_fit_are_refused(shape, message, model_directory, tmp_path):
    from megatron_idpo.convert.hf_to_megatron import open_hf

    shutil.copytree(model_directory("mixtral"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    width, hidden = weights["model.layers.0.block_sparse_moe.experts.0.w1.weight"].shape
    shape = shape or (4, 2 * width, hidden)
    weights["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(shape)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_hf(tmp_path)
