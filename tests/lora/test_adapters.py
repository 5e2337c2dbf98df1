"""Adapters in every layout: what PEFT computes, the same start, off without a trace, removed."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.lora.names import peft_name

from .lora_case import ADAM, CLIP, MODELS, NUM_SEQUENCES, SETTINGS, STEPS, Case, tokens
from .lora_run import adapted, logits_of, merged, train, whole

pytestmark = pytest.mark.distributed

# fp32 sums in another order, on logits of order 1.
LOGITS_ABSOLUTE = 1e-5
# The same, on gradients and their norm, as |difference| / |gradient| (Frobenius).
GRADIENT_RELATIVE = 1e-5
# After two Adam steps (eps 1e-4, so that tiny gradients are not blown up), in units of the lr.
STEP_IN_LR = 2e-3

TP1, TP2, TP4 = Layout(), Layout(tensor=2), Layout(tensor=4)
TP2_SP, TP4_SP = (Layout(tensor=size, sequence_parallel=True) for size in (2, 4))
PP2, PP2_VP2 = Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)
TP2_PP2 = Layout(tensor=2, pipeline=2)
TP2_PP2_SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)
TP2_PP2_VP2_SP = Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True)

CASES = [
    Case(model="llama-untied", settings="rslora"),
    Case(model="llama-mha", recompute="full"),
    Case(model="qwen3", settings="q-v"),
    Case(layout=TP2, model="qwen2"),
    Case(layout=TP2_SP, model="qwen3", recompute="full"),
    Case(layout=TP2_SP, model="llama-tied", settings="k-o-up", recompute="selective"),
    Case(layout=PP2, model="llama-untied", settings="gate-down"),
    Case(layout=PP2_VP2, model="qwen2"),
    Case(layout=TP2_PP2_SP, model="llama-tied"),
    Case(data=2, sync="distributed", model="llama-tied"),
    Case(layout=TP2_SP, data=2, sync="overlap", model="qwen2"),
]
EXHAUSTIVE = [
    Case(layout=layout, model=model, settings=settings, recompute=recompute)
    for layout, (model, settings, recompute) in product(
        (TP1, TP2, TP2_SP, TP4, TP4_SP, PP2, PP2_VP2, TP2_PP2, TP2_PP2_SP, TP2_PP2_VP2_SP),
        [
            *((model, "all", "off") for model in MODELS),
            *(("qwen2", settings, "full") for settings in SETTINGS),
        ],
    )
] + [
    Case(layout=layout, data=2, sync=sync, recompute=recompute)
    for layout, sync, recompute in product(
        (TP1, TP2, TP2_SP, PP2, PP2_VP2, TP2_PP2_SP),
        ("plain", "overlap", "distributed"),
        ("off", "full"),
    )
]


def _params() -> list[Any]:
    rest = [case for case in EXHAUSTIVE if case not in CASES]
    marked = [pytest.param(case, id=str(case), marks=pytest.mark.exhaustive) for case in rest]
    return [*(pytest.param(case, id=str(case)) for case in CASES), *marked]


@pytest.mark.parametrize("case", _params())
def test_every_layout_trains_as_peft(case, workers, base_model, peft_adapter, peft_answer):
    base, adapter = base_model(case.model), peft_adapter(case.model, case.settings)
    answers = workers.run(train, case.world_size, str(base), str(adapter), case)
    truth = peft_answer(case.model, case.settings)
    logits = merged([answer["logits"] for answer in answers])
    whole_logits = torch.cat([logits[number] for number in range(NUM_SEQUENCES)])
    assert (whole_logits - truth["logits"]).abs().max() <= LOGITS_ABSOLUTE
    if case.sync != "distributed":  # each rank has a part of the sum then
        gradients = merged([answer["gradients"] for answer in answers])
        assert gradients.keys() == truth["gradients"].keys()
        for name, gradient in truth["gradients"].items():
            relative = (gradients[name] - gradient).norm() / gradient.norm()
            assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"
    for norms in (answer["norms"] for answer in answers):
        assert norms == pytest.approx(truth["norms"], rel=GRADIENT_RELATIVE)
    assert min(truth["norms"]) > 2 * CLIP
    trained = merged([answer["adapters"] for answer in answers])
    assert trained.keys() == truth["adapters"].keys()
    for name, tensor in truth["adapters"].items():
        moved = (trained[name] - tensor).abs().max() / ADAM["lr"]
        assert moved <= STEP_IN_LR * STEPS, f"{name}: {moved:.2e} lr"


def fresh(base: str, layout: Layout, settings: LoraConfig, seed: int) -> dict[str, torch.Tensor]:
    return whole(adapted(base, layout, settings, seed=seed)[2])


def test_the_start_is_the_same_in_every_layout(workers, base_model):
    settings, base = LoraConfig(rank=4), str(base_model("qwen3"))
    first = merged(workers.run(fresh, 1, base, TP1, settings, 7))
    for layout in (TP2_SP, PP2_VP2):
        other = merged(workers.run(fresh, 2, base, layout, settings, 7))
        assert other.keys() == first.keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in other.items())
    downs = {name: tensor for name, tensor in first.items() if "lora_A" in name}
    assert all(not tensor.any() for name, tensor in first.items() if name not in downs)
    for name, tensor in downs.items():
        bound = tensor.shape[1] ** -0.5
        assert 0.9 * bound < tensor.abs().max() <= bound, name
        # Uniform: the variance is a third of the bound's square; 256 draws and more.
        assert tensor.var() == pytest.approx(bound**2 / 3, rel=0.25), name
    q, k = (downs[peft_name(0, projection, "A")] for projection in ("q_proj", "k_proj"))
    assert not torch.equal(q, k)
    seeded = merged(workers.run(fresh, 1, base, TP1, settings, 8))
    assert not any(torch.equal(downs[name], seeded[name]) for name in downs)


def test_it_starts_as_peft_does(base_model):
    """The same distribution: bound and variance of PEFT's A's."""
    from peft import LoraConfig, get_peft_model

    from .conftest import hf_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    for name, parameter in get_peft_model(hf_model(base_model("qwen3")), config).named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert parameter.detach().var() == pytest.approx(bound**2 / 3, rel=0.25), name


def switched(base: str, adapter: str, layout: Layout, recompute: bool) -> dict[str, Any]:
    """Logits without adapters, with them on and off, after an error inside, and removed."""
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
    found = {"bare": logits_of(chunk, sequences)}
    adapters = add_adapters(chunks, architecture, SETTINGS["all"])
    load_peft(adapters, architecture, Path(adapter))
    found["on"] = logits_of(chunk, sequences)
    with adapters.disabled():
        found["off"] = logits_of(chunk, sequences)
        with adapters.disabled():
            pass
        found["still off"] = logits_of(chunk, sequences)
    with pytest.raises(ZeroDivisionError), adapters.disabled():
        1 / 0  # noqa: B018 - any error
    found["on again"] = logits_of(chunk, sequences)
    adapters.remove()
    adapters.remove()
    found["removed"] = logits_of(chunk, sequences)
    assert names == [name for name, _ in chunk.named_parameters()]
    assert all(parameter.requires_grad for parameter in chunk.parameters())
    assert not any("forward" in vars(module) for module in chunk.modules())
    assert not chunk.embedding._forward_hooks
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize(("layout", "recompute"), [(TP1, False), (TP2_SP, True)])
def test_off_is_the_bare_model_to_the_bit(layout, recompute, workers, base_model, peft_adapter):
    base, adapter = str(base_model("qwen2")), str(peft_adapter("qwen2"))
    for found in workers.run(switched, layout.model_ranks, base, adapter, layout, recompute):
        for name in ("off", "still off", "removed"):
            assert torch.equal(found[name], found["bare"]), name
        assert torch.equal(found["on"], found["on again"])
        assert (found["on"] - found["bare"]).abs().max() > 0.1


def learning(base: str, layout: Layout) -> tuple[list[str], list[str]]:
    chunks, _, adapters = adapted(base, layout, LoraConfig(rank=2, targets=("k_proj",)))
    trained = {id(parameter): name for name, parameter in adapters.parameters()}
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    found = [trained.get(id(one), "base") for one in parameters if one.requires_grad]
    return found, list(trained.values())


def test_only_adapters_learn(workers, base_model):
    """Under names that count layers over the whole model."""
    answers = workers.run(learning, 2, str(base_model("qwen2")), PP2_VP2)
    for (found, named), layers in zip(answers, ((0, 2), (1, 3)), strict=True):
        assert found == named
        assert named == [f"lora.layers.{n}.k_proj.{side}" for n in layers for side in "AB"]


def refused(base: str, how: str) -> str:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    settings = LoraConfig(rank=2)
    chunks, architecture, adapters = adapted(base, Layout(), settings)
    if how == "twice":
        with pytest.raises(ConfigError) as error:
            add_adapters(chunks, architecture, settings)
        return str(error.value)
    if how == "wrapped":
        ddp = DistributedDataParallelConfig()
        chunks = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    else:
        adapters.remove()
    if how == "attached":
        attach(chunks, layers=[1], objective=Objective(), vocab_size=architecture.vocab_size)
    elif how == "other linear":
        chunks[0].decoder.layers[1].mlp.linear_fc1 = torch.nn.Linear(2, 2)
    elif how == "experts":
        chunks[0].config.num_moe_experts = 2
        chunks[0].decoder.layers[0].mlp = torch.nn.Identity()
    elif how == "none":
        chunks = []
    with pytest.raises(ConfigError) as error:
        add_adapters(chunks, architecture, settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("twice", "chunks[0]: has adapters already; remove() those first"),
        ("wrapped", "chunks[0]: is a DistributedDataParallel, not a GPTModel; add adapters first"),
        ("attached", "chunks[0]: is attached to; add adapters first, then attach"),
        ("other linear", "gate_proj, up_proj have no linear_fc1 of megatron-core's own in layer 2"),
        ("experts", "down_proj are experts in this model; adapt the attention only"),
        ("none", "chunks: is empty"),
    ],
)
def test_what_cannot_work_is_refused(how, reason, workers, base_model):
    (message,) = workers.run(refused, 1, str(base_model("llama-tied")), how)
    assert reason in message
