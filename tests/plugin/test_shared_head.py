"""Copies of the head on several stages: optimizer steps, gradient norm, memory, detaching.

Their gradients are compared with the oracle in `test_attach.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.objective.dpo import Objective

from . import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

STEPS, LR = 3, 1e-2

NORM_RELATIVE = 1e-5
"""A global gradient norm in fp32, summed in another order over other ranks."""

SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    layout: Layout
    layers: tuple[int, ...]
    data: int = 1
    tied: bool = False
    half: bool = False
    ddp: dict[str, bool] = field(default_factory=dict)
    optimizer: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        layout = self.layout
        names = [f"TP{layout.tensor}-PP{layout.pipeline}-VP{layout.virtual_pipeline}-DP{self.data}"]
        names += [name for name in ("tied", "half") if getattr(self, name)]
        return "-".join([*names, *self.ddp, *self.optimizer])


def exhaustive(case: Case) -> Any:
    return pytest.param(case, marks=pytest.mark.exhaustive, id=str(case))


# Everything that could make copies diverge: another learning rate for output layers, decay,
# clipping, other cuts of the distributed optimizer, 16-bit weights with fp32 main parameters.
CASES = [
    Case(
        layout=Layout(pipeline=2),
        layers=(1, 2),
        optimizer={"decoupled_lr": 3e-2, "weight_decay": 0.1, "clip_grad": 0.5},
    ),
    Case(
        layout=Layout(pipeline=2, virtual_pipeline=2),
        layers=(1, 2, 3),
        tied=True,
        ddp=SHARDED,
        optimizer={"clip_grad": 0.5},
    ),
    Case(layout=Layout(pipeline=2), layers=(1, 3), half=True, ddp=SHARDED),
    exhaustive(
        Case(
            layout=Layout(pipeline=2, virtual_pipeline=2),
            layers=(1, 2, 3),
            data=2,
            tied=True,
            half=True,
            ddp=OVERLAPPED,
            optimizer={"decoupled_lr": 3e-2, "weight_decay": 0.1, "clip_grad": 0.5},
        )
    ),
    exhaustive(Case(layout=Layout(pipeline=2), layers=(1, 2), data=2, ddp=OVERLAPPED)),
    exhaustive(Case(layout=Layout(pipeline=4), layers=(1, 2, 3), optimizer={"clip_grad": 0.5})),
    exhaustive(Case(layout=Layout(pipeline=4), layers=(2,), tied=True, data=2, ddp=SHARDED)),
    exhaustive(
        Case(
            layout=Layout(tensor=2, pipeline=2, sequence_parallel=True),
            layers=(1, 2, 3),
            ddp=SHARDED,
            optimizer={"clip_grad": 0.5},
        )
    ),
]


def optimizer_for(models: list[Any], case: Case) -> Any:
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )

    settings = {"weight_decay": 0.0, "clip_grad": 1e6, **case.optimizer}
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        min_lr=0.0,
        adam_eps=1e-4,
        bf16=case.half,
        use_distributed_optimizer=bool(case.ddp.get("use_distributed_optimizer")),
        overlap_param_gather=bool(case.ddp.get("overlap_param_gather")),
        **settings,
    )
    optimizer = get_megatron_optimizer(
        config, models, config_overrides=get_standard_config_overrides(config)
    )
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]  # as megatron-core's scheduler does
    return optimizer


def copies(chunks: list[Any], tied: bool) -> dict[str, list[Tensor]]:
    """All copies on this rank, including the owned parameters and the tied embedding."""
    held: dict[str, list[Tensor]] = {"weight": [], "norm": []}
    for chunk in chunks:
        replica = getattr(chunk, "head_replica", None)
        if replica is not None:
            held["norm"].append(replica.norm.weight)
            held["weight"] += [replica.weight] if replica.weight is not None else []
        if chunk.post_process:
            held["norm"].append(chunk.decoder.final_layernorm.weight)
            weight = chunk.output_layer.weight  # None on a single stage with tied embeddings
            held["weight"] += [weight] if weight is not None else []
        if chunk.pre_process and tied:
            held["weight"].append(chunk.embedding.word_embeddings.weight)
    return {name: [copy.detach().clone() for copy in group] for name, group in held.items()}


def fine_tune(case: Case) -> dict[str, Any]:
    """Train a few steps; return the copies before and after, and the gradient norms."""
    from megatron.core.transformer.module import Float16Module

    from megatron_idpo.mcore.parallel.groups import rank_coordinates
    from megatron_idpo.plugin.attach import attach

    dtype = torch.bfloat16 if case.half else torch.float32
    chunks = tiny.start(case.layout, tied=case.tied, dtype=dtype)
    config = chunks[0].config
    objective = Objective(beta=0.3, intermediate_weight=0.4)
    dpo = attach(chunks, layers=case.layers, objective=objective, vocab_size=tiny.VOCAB)
    inner = [Float16Module(config, chunk) for chunk in chunks] if case.half else chunks
    models = tiny.wrap(dpo, inner, grad_reduce_in_fp32=case.half, **case.ddp)
    if case.ddp.get("overlap_grad_reduce"):
        config.no_sync_func = [model.no_sync for model in models]
        config.no_sync_func = config.no_sync_func[0] if len(models) == 1 else config.no_sync_func
    optimizer = optimizer_for(models, case)
    batches = tiny.micro_batches(tiny.references([*case.layers, tiny.NUM_LAYERS]))
    before, norms = copies(chunks, case.tied), []
    for _ in range(STEPS):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        tiny.run(dpo, models, batches)
        updated, norm, _ = optimizer.step()
        assert updated
        norms.append(float(norm))
    if case.ddp.get("overlap_param_gather"):
        for model in models:
            model.disable_forward_pre_hook(param_sync=True)
    return {
        "shard": rank_coordinates().tp_rank,
        "before": before,
        "after": copies(chunks, case.tied),
        "norms": norms,
    }


@pytest.fixture(scope="module")
def one_rank_norm(workers):
    """The gradient norm of the first step on one rank, without copies."""
    known: dict[Any, float] = {}

    def norm(case: Case) -> float:
        key = (case.layers, case.tied)
        if key not in known:
            plain = Case(layout=Layout(), layers=case.layers, tied=case.tied)
            (answer,) = workers.run(fine_tune, 1, plain)
            known[key] = answer["norms"][0]
        return known[key]

    return norm


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_stay_equal_and_count_once_in_the_gradient_norm(workers, one_rank_norm, case):
    answers = workers.run(fine_tune, case.layout.model_ranks * case.data, case)
    for name in ("weight", "norm"):
        for shard in range(case.layout.tensor):
            of_shard = [answer for answer in answers if answer["shard"] == shard]
            before = [copy for answer in of_shard for copy in answer["before"][name]]
            after = [copy for answer in of_shard for copy in answer["after"][name]]
            assert len(after) == len(before) > case.data, "expected a copy in addition to the owner"
            assert all(torch.equal(copy, before[0]) for copy in before)
            assert all(torch.equal(copy, after[0]) for copy in after)
            moved = (after[0].float() - before[0].float()).abs().max()
            assert moved > LR, "the weights did not change"
    assert len({answer["norms"][-1] for answer in answers}) == 1, "ranks disagree on the norm"
    if not case.half and case.layout.tensor == 1:
        expected = one_rank_norm(case)
        assert abs(answers[0]["norms"][0] - expected) <= NORM_RELATIVE * expected


# ---- resuming ------------------------------------------------------------------------------------


def interrupted(directory: str, layout: Layout, tied: bool, resumes: bool) -> list[dict[str, Any]]:
    """Weights after step 3: uninterrupted, with a checkpoint after step 2, or resumed from it."""
    from megatron.core import dist_checkpointing

    from megatron_idpo.plugin.attach import attach

    case = Case(layout=layout, layers=(1, 2, 3), tied=tied)
    chunks = tiny.start(layout, tied=tied)
    objective = Objective(beta=0.3, intermediate_weight=0.4)
    dpo = attach(chunks, layers=case.layers, objective=objective, vocab_size=tiny.VOCAB)
    models = tiny.wrap(dpo, chunks)
    optimizer = optimizer_for(models, case)
    batches = tiny.micro_batches(tiny.references([*case.layers, tiny.NUM_LAYERS]))

    def step() -> None:
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        tiny.run(dpo, models, batches)
        optimizer.step()

    def state() -> dict[str, Any]:
        weights = {f"model{n}": chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
        of_model = weights if len(chunks) > 1 else weights["model0"]
        return {**weights, "optimizer": optimizer.sharded_state_dict(of_model)}

    if resumes:
        step()
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.data.fill_(torch.nan)
        loaded = dist_checkpointing.load(state(), directory)
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{number}"])
        optimizer.load_state_dict(loaded["optimizer"])
    else:
        step()
        step()
        dist_checkpointing.save(state(), directory)
    step()
    return [{name: p.detach() for name, p in chunk.named_parameters()} for chunk in chunks]


@pytest.mark.exhaustive
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "layout", [Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)], ids=["PP2", "VP2"]
)
def test_resume_from_a_megatron_checkpoint_is_bitwise_exact(workers, tmp_path, layout, tied):
    """Includes the weights and optimizer state of every copy."""
    expected = workers.run(interrupted, 2, str(tmp_path), layout, tied, False)
    resumed_by_rank = workers.run(interrupted, 2, str(tmp_path), layout, tied, True)
    for chunks, resumed in zip(expected, resumed_by_rank, strict=True):
        for weights, other in zip(chunks, resumed, strict=True):
            assert weights.keys() == other.keys()
            assert [name for name in weights if not torch.equal(weights[name], other[name])] == []


# ---- memory and trainability ---------------------------------------------------------------------


def frozen_copies() -> dict[str, Any]:
    """Two tapped chunks without the head on the first stage, one on the last."""
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.plugin.attach import attach

    layout = Layout(pipeline=2, virtual_pipeline=2)
    start_layout(layout)
    results: dict[str, Any] = {}
    for name, tied, trains in (
        ("frozen", False, False),
        ("tied", True, False),
        ("norm", False, True),
    ):
        chunks = tiny.chunks_of(layout, tied=tied, frozen_head=True)
        for chunk in chunks:
            if chunk.post_process:
                chunk.decoder.final_layernorm.requires_grad_(trains)
        dpo = attach(chunks, layers=[1, 2, 3], objective=Objective(), vocab_size=tiny.VOCAB)
        owned = [chunk.embedding.word_embeddings.weight for chunk in chunks if chunk.pre_process]
        owned = owned if tied else []
        owned += [chunk.output_layer.weight for chunk in chunks if chunk.post_process]
        replicas = [chunk.head_replica for chunk in chunks if hasattr(chunk, "head_replica")]
        weights = [r.weight for r in replicas if r.weight is not None] + owned
        results[name] = {
            "replicas": len(replicas),
            "weights": len({weight.data_ptr() for weight in weights}),
            "norms": len({replica.norm.weight.data_ptr() for replica in replicas}),
            "weight_trains": {weight.requires_grad for weight in weights},
            "norm_trains": {replica.norm.weight.requires_grad for replica in replicas},
            "has_trained_copies": dpo._shared_head.has_trained_copies,
        }
    return results


def test_frozen_copies_of_a_rank_share_memory(workers):
    first, last = workers.run(frozen_copies, 2)
    for answer, replicas in ((first, 2), (last, 1)):
        for name in ("frozen", "tied"):
            result = answer[name]
            assert result["replicas"] == replicas
            assert result["weights"] == 1, "one output weight for all chunks of a rank"
            assert result["norms"] == 1
            assert result["weight_trains"] == {False} and result["norm_trains"] == {False}
            assert not result["has_trained_copies"]
        assert answer["norm"]["weights"] == 1 and answer["norm"]["norms"] == replicas
        assert answer["norm"]["weight_trains"] == {False}
        assert answer["norm"]["norm_trains"] == {True} and answer["norm"]["has_trained_copies"]


# ---- detaching -----------------------------------------------------------------------------------


def fingerprint(chunk: Any) -> dict[str, Any]:
    """Everything that attaching could leave behind."""
    return {
        "keys": list(chunk.state_dict()),
        "sharded": sorted(chunk.sharded_state_dict()),
        "parameters": {
            name: (p.requires_grad, p.data_ptr(), sorted(vars(p)))
            for name, p in chunk.named_parameters()
        },
        "hooks": {
            name: [len(hooks) for key, hooks in sorted(vars(module).items()) if "_hooks" in key]
            for name, module in chunk.named_modules()
        },
        "patched": [name for name, module in chunk.named_modules() if "forward" in vars(module)],
        "modules": [name for name, _ in chunk.named_modules()],
    }


def attach_and_detach(layout: Layout, tied: bool) -> list[str]:
    """Attach and detach twice; return what differs from before. Losses must be equal both times."""
    from megatron_idpo.plugin.attach import attach

    chunks = tiny.start(layout, tied=tied)
    before = [fingerprint(chunk) for chunk in chunks]
    reference = tiny.references([1, 2, 4])
    logits = [plain_forward(chunks)] if len(chunks) == 1 and layout.pipeline == 1 else []
    outputs = []
    for _ in range(2):
        dpo = attach(chunks, layers=[1, 2], objective=Objective(), vocab_size=tiny.VOCAB)
        batches = tiny.micro_batches(reference)
        evaluated = tiny.run(dpo, chunks, batches, forward_only=True)
        outputs.append(tiny.by_layer(evaluated, "loss_P"))
        dpo.detach()
        dpo.detach()
        after = [fingerprint(chunk) for chunk in chunks]
        differences = [
            f"{name}: {old[name]} != {new[name]}"
            for old, new in zip(before, after, strict=True)
            for name in old
            if old[name] != new[name]
        ]
        logits += [plain_forward(chunks)] if logits else []
    assert all(torch.equal(other, logits[0]) for other in logits)
    for layer, loss_P in outputs[0].items():
        assert torch.equal(loss_P, outputs[1][layer])
    return differences


def plain_forward(chunks: list[Any]) -> Tensor:
    from megatron_idpo.mcore.attention.row_params import RowParams

    row = RowParams.plain(tiny.ROW_TOKENS)
    tokens_1T = torch.arange(tiny.ROW_TOKENS)[None] % tiny.VOCAB
    return chunks[0](tokens_1T, row.position_ids_T[None], None, packed_seq_params=row).detach()


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        (Layout(), False),
        (Layout(pipeline=2), False),
        (Layout(pipeline=2, virtual_pipeline=2), True),
    ],
    ids=["one-rank", "PP2", "VP2-tied"],
)
def test_detach_restores_the_chunks(workers, layout, tied):
    for differences in workers.run(attach_and_detach, layout.model_ranks, layout, tied):
        assert differences == []
