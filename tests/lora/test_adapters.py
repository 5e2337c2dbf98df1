"""Adapters in every layout: equal to PEFT, initialized alike, disabled and removed exactly."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.lora.adapters import hf_module
from megatron_idpo.lora.peft import peft_name

from .lora_case import EXPERT_MODELS, MODELS, SETTINGS, Case, tokens
from .lora_run import adapted, gradients_in_bf16, logits_of, merged, train, whole
from .peft_parity import assert_equals_peft

pytestmark = pytest.mark.distributed

TP1, TP2, TP4 = Layout(), Layout(tensor=2), Layout(tensor=4)
TP2_SP, TP4_SP = (Layout(tensor=size, sequence_parallel=True) for size in (2, 4))
PP2, PP2_VP2 = Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2 = Layout(tensor=2, pipeline=2)
TP2_PP2_SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)
EP2_TP2_PP2 = Layout(expert=2, expert_tensor=1, tensor=2, pipeline=2, sequence_parallel=True)
EP2_TP2 = Layout(expert=2, tensor=2, sequence_parallel=True)
TP2_PP2_VP2_SP = Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True)

CASES = [
    Case(model="llama-untied", settings="rslora"),
    Case(model="llama-mha", recompute="full"),
    Case(model="qwen3", settings="q-v"),
    Case(layout=TP2, model="qwen2"),
    Case(layout=TP2_SP, model="qwen3", recompute="full"),
    Case(layout=TP2_SP, model="llama-tied", settings="k-o-up", recompute="selective"),
    Case(layout=PP2_VP2, model="qwen2"),
    Case(data=2, sync="distributed", model="llama-tied"),
    Case(layout=TP2_SP, data=2, sync="overlap", model="qwen2"),
    Case(layout=EP2_TP2_PP2, model="qwen2-moe", settings="expert-down", recompute="full"),
    Case(layout=EP2_TP2, data=2, sync="overlap", model="mixtral", settings="experts"),
]
BF16_CASES = [Case(layout=TP2, model="qwen2"), Case(layout=TP2_SP, model="qwen3", recompute="full")]
EXHAUSTIVE = (
    [
        Case(layout=layout, model=model, settings=settings, recompute=recompute)
        for layout, (model, settings, recompute) in product(
            (TP1, TP2, TP2_SP, TP4, TP4_SP, PP2, PP2_VP2, TP2_PP2, TP2_PP2_SP, TP2_PP2_VP2_SP),
            [
                *((model, "all", "off") for model in MODELS if model not in EXPERT_MODELS),
                *(("qwen2", name, "full") for name in SETTINGS if "expert" not in name),
            ],
        )
    ]
    + [Case(layout=PP2, model="llama-untied", settings="gate-down")]
    + [
        Case(layout=layout, data=2, sync=sync, recompute=recompute)
        for layout, sync, recompute in product(
            (TP1, TP2, TP2_SP, PP2, PP2_VP2, TP2_PP2_SP),
            ("plain", "overlap", "distributed"),
            ("off", "full"),
        )
    ]
    + [
        Case(
            layout=layout, data=data, sync=sync, model=model, settings=settings, recompute=recompute
        )
        for (layout, data, sync), (model, settings, recompute) in product(
            (
                (TP1, 1, "plain"),
                (TP2_SP, 1, "plain"),
                (TP2_SP, 2, "distributed"),
                (EP2_TP2_PP2, 2, "distributed"),
                (Layout(expert=2, pipeline=2, virtual_pipeline=2), 2, "overlap"),
                (EP2_TP2, 2, "overlap"),
                (Layout(expert=4), 4, "distributed"),
            ),
            (
                ("mixtral", "experts", "off"),
                ("qwen3-moe", "experts", "full"),
                ("qwen3-moe", "expert-down", "off"),
                ("qwen2-moe", "experts", "off"),
            ),
        )
    ]
)


def _params() -> list[Any]:
    rest = [case for case in EXHAUSTIVE if case not in CASES]
    marked = [pytest.param(case, id=str(case), marks=pytest.mark.exhaustive) for case in rest]
    return [*(pytest.param(case, id=str(case)) for case in CASES), *marked]


@pytest.mark.parametrize("case", _params())
def test_training_equals_peft_in_every_layout(case, workers, base_model, peft_adapter, peft_result):
    base, adapter = base_model(case.model), peft_adapter(case.model, case.settings)
    by_rank = workers.run(train, case.world_size, str(base), str(adapter), case)
    expected = peft_result(case.model, case.settings)
    assert_equals_peft(by_rank, expected, case)


BF16_GRADIENT_RELATIVE = 0.05
"""|difference| / |gradient| of a model in bf16 with few features, against fp32. A gradient that
lacks one of two ranks' parts is wrong by about 0.7, one that counts them twice by 1."""


@pytest.mark.parametrize("case", BF16_CASES, ids=map(str, BF16_CASES))
def test_gradients_in_bf16_are_those_of_fp32(case, workers, base_model, peft_adapter, peft_result):
    base, adapter = base_model(case.model), peft_adapter(case.model, case.settings)
    by_rank = workers.run(gradients_in_bf16, case.world_size, str(base), str(adapter), case)
    expected, found = peft_result(case.model, case.settings)["gradients"], merged(by_rank)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= BF16_GRADIENT_RELATIVE, f"{name}: {error:.3f}"


def fresh(base: str, layout: Layout, settings: LoraConfig, seed: int) -> dict[str, torch.Tensor]:
    return whole(adapted(base, layout, settings, seed=seed)[2])


def test_initialization_is_the_same_in_every_layout(workers, base_model):
    settings, base = LoraConfig(rank=4), str(base_model("qwen3"))
    first = merged(workers.run(fresh, 1, base, TP1, settings, 7))
    for layout in (TP2_SP, PP2_VP2):
        other = merged(workers.run(fresh, 2, base, layout, settings, 7))
        assert other.keys() == first.keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in other.items())
    a_tensors = {name: tensor for name, tensor in first.items() if "lora_A" in name}
    assert all(not tensor.any() for name, tensor in first.items() if name not in a_tensors)
    for name, tensor in a_tensors.items():
        bound = tensor.shape[1] ** -0.5
        assert 0.9 * bound < tensor.abs().max() <= bound, name
        # Uniform: the variance is bound² / 3; at least 256 values.
        assert tensor.var() == pytest.approx(bound**2 / 3, rel=0.25), name
    q, k = (a_tensors[peft_name(hf_module(0, name), "A")] for name in ("q_proj", "k_proj"))
    assert not torch.equal(q, k)
    seeded = merged(workers.run(fresh, 1, base, TP1, settings, 8))
    assert not any(torch.equal(a_tensors[name], seeded[name]) for name in a_tensors)


def test_initial_distribution_equals_peft(base_model):
    """Bound and variance of PEFT's A."""
    from peft import LoraConfig, get_peft_model

    from .conftest import hf_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    for name, parameter in get_peft_model(hf_model(base_model("qwen3")), config).named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert parameter.detach().var() == pytest.approx(bound**2 / 3, rel=0.25), name


def logits_in_bf16(base: str) -> dict[str, torch.Tensor]:
    """Logits of a policy before its first step, and of its references."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.mcore.lora.chunk import round_once
    from megatron_idpo.mcore.model.build import ModelOptions, build_model

    options = {"dtype": torch.bfloat16}
    (policy,), architecture, adapters = adapted(base, TP1, LoraConfig(rank=4), **options)
    sequences = tokens(architecture.vocab_size, 0)[:, :-1]
    logits = {"policy": logits_of(policy, sequences)}
    with adapters.disabled():
        logits["policy without adapters"] = logits_of(policy, sequences)
    (resident,) = build_model(architecture, TP1, ModelOptions(dtype=torch.bfloat16))
    round_once(resident)
    load_hf_weights([resident], open_hf(Path(base))[0], architecture)
    with torch.no_grad():  # its weights are not marked as frozen
        logits["resident reference"] = logits_of(resident, sequences)
    adapters.remove()
    assert not any("forward" in vars(module) for module in policy.modules())
    return {name: tensor.detach() for name, tensor in logits.items()}


def test_policy_and_references_in_bf16_are_bitwise_equal_at_the_start(workers, base_model):
    (logits,) = workers.run(logits_in_bf16, 1, str(base_model("qwen2")))
    policy = logits.pop("policy")
    assert all(torch.equal(policy, reference) for reference in logits.values())


def logits_by_state(base: str, adapter: str, layout: Layout, recompute: bool) -> dict[str, Any]:
    """Logits of the base model, and with adapters enabled, disabled and removed."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.lora.peft import load_peft
    from megatron_idpo.mcore.model.build import ModelOptions, Recompute, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    checkpoint, architecture = open_hf(Path(base))
    start_layout(layout)
    options = ModelOptions(recompute=Recompute(granularity="full" if recompute else "off"))
    chunks = build_model(architecture, layout, options)
    load_hf_weights(chunks, checkpoint, architecture)
    (chunk,) = chunks
    names = [name for name, _ in chunk.named_parameters()]
    sequences = tokens(architecture.vocab_size, 0)[:, :-1]
    logits = {"base": logits_of(chunk, sequences)}
    adapters = add_adapters(chunks, architecture, SETTINGS["all"])
    load_peft(adapters, architecture, Path(adapter))
    logits["enabled"] = logits_of(chunk, sequences)
    with adapters.disabled():
        logits["disabled"] = logits_of(chunk, sequences)
        with adapters.disabled():
            pass
        logits["nested block"] = logits_of(chunk, sequences)
    with pytest.raises(ZeroDivisionError), adapters.disabled():
        1 / 0  # noqa: B018 - any error
    logits["after an error"] = logits_of(chunk, sequences)
    adapters.remove()
    adapters.remove()
    logits["removed"] = logits_of(chunk, sequences)
    assert names == [name for name, _ in chunk.named_parameters()]
    assert all(parameter.requires_grad for parameter in chunk.parameters())
    assert not any("forward" in vars(module) for module in chunk.modules())
    assert not chunk.embedding._forward_hooks
    return {name: tensor.detach() for name, tensor in logits.items()}


@pytest.mark.parametrize(("layout", "recompute"), [(TP1, False), (TP2_SP, True)])
def test_disabled_adapters_give_the_base_model_bitwise(
    layout, recompute, workers, base_model, peft_adapter
):
    base, adapter = str(base_model("qwen2")), str(peft_adapter("qwen2"))
    for logits in workers.run(
        logits_by_state, layout.model_ranks, base, adapter, layout, recompute
    ):
        for name in ("disabled", "nested block", "removed"):
            assert torch.equal(logits[name], logits["base"]), name
        assert torch.equal(logits["enabled"], logits["after an error"])
        assert (logits["enabled"] - logits["base"]).abs().max() > 0.1


def trained_names(base: str, layout: Layout) -> tuple[list[str], list[str]]:
    chunks, _, adapters = adapted(base, layout, LoraConfig(rank=2, targets=("k_proj",)))
    trained = {id(parameter): name for name, parameter in adapters.parameters()}
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trainable = [trained.get(id(p), "base") for p in parameters if p.requires_grad]
    return trainable, list(trained.values())


def test_only_adapters_are_trained_under_global_names(workers, base_model):
    by_rank = workers.run(trained_names, 2, str(base_model("qwen2")), PP2_VP2)
    for (trainable, names), layers in zip(by_rank, ((0, 2), (1, 3)), strict=True):
        assert trainable == names
        assert names == [f"lora.layers.{n}.k_proj.{side}" for n in layers for side in "AB"]


def rejection(base: str, mistake: str) -> str:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    settings = LoraConfig(rank=2)
    chunks, architecture, adapters = adapted(base, Layout(), settings)
    if mistake == "twice":
        with pytest.raises(ConfigError) as error:
            add_adapters(chunks, architecture, settings)
        return str(error.value)
    if mistake == "wrapped":
        ddp = DistributedDataParallelConfig()
        chunks = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    else:
        adapters.remove()
    if mistake == "attached":
        attach(chunks, layers=[1], objective=Objective(), vocab_size=architecture.vocab_size)
    elif mistake == "other linear":
        chunks[0].decoder.layers[1].mlp.linear_fc1 = torch.nn.Linear(2, 2)
    elif mistake == "experts":
        chunks[0].config.num_moe_experts = 2
        chunks[0].decoder.layers[0].mlp = torch.nn.Identity()
    elif mistake == "none":
        chunks = []
    with pytest.raises(ConfigError) as error:
        add_adapters(chunks, architecture, settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ("twice", "chunks[0]: has adapters already; remove() them first"),
        ("wrapped", "chunks[0]: is a DistributedDataParallel, not a GPTModel; add adapters first"),
        ("attached", "chunks[0]: is attached already; add adapters first, then attach"),
        (
            "other linear",
            "gate_proj, up_proj need a parallel linear_fc1 of megatron-core, which layer 2 lacks",
        ),
        ("experts", "down_proj are experts in this model; name them in lora.target_parameters"),
        ("none", "chunks: is empty"),
    ],
)
def test_invalid_chunks_are_rejected_with_a_reason(mistake, reason, workers, base_model):
    (message,) = workers.run(rejection, 1, str(base_model("llama-tied")), mistake)
    assert reason in message
