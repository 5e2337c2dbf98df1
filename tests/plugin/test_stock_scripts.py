"""What a training script with stock models may do: evaluate between steps, attach two models.

Also: the same pairs in every batch layout, and `HybridModel`.
"""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout

from . import stock_model as stock
from . import stock_run
from . import tiny_megatron as tiny
from .stock_run import BATCHES, BETA, WEIGHT, Case, micro_batches, run_step

pytestmark = pytest.mark.distributed

RELATIVE = 1e-5
"""fp32 sums in another order."""

LAYERS, NUM_LAYERS = (1, 3), 4
STAGES = Case(pipeline=2)


def attached(chunks: list[Any]) -> Any:
    from megatron_idpo import Objective, attach

    objective = Objective(beta=BETA, intermediate_weight=WEIGHT)
    return attach(chunks, layers=LAYERS, objective=objective, vocab_size=stock.VOCAB)


# ---- evaluation and several models ---------------------------------------------------------------


def script(with_evaluation: bool, with_other_model: bool) -> dict[str, Any]:
    """Two steps of a model, with other work between them; logs, gradients, evaluation figures."""
    from megatron_idpo.plugin.outputs import LayerOutput

    stock_run.start(STAGES)
    chunks = stock.build(STAGES.layout, num_layers=NUM_LAYERS)
    dpo = attached(chunks)
    models = tiny.wrap(dpo, chunks)
    batches = micro_batches((*LAYERS, NUM_LAYERS), STAGES)
    other, other_models = None, []
    if with_other_model:
        other_chunks = stock.build(STAGES.layout, num_layers=NUM_LAYERS)
        for parameter in (p for chunk in other_chunks for p in chunk.parameters()):
            parameter.data.mul_(0.5)
        other = attached(other_chunks)
        other_models = tiny.wrap(other, other_chunks)

    def log_of(dpo: Any, models: list[Any], **options: Any) -> dict[str, float]:
        return stock_run.log_means(run_step(dpo, models, batches, STAGES, **options)[1])

    result: dict[str, Any] = {"logs": [], "evaluated": [], "reported": []}
    for _ in range(2):
        for model in models:
            model.zero_grad_buffer()
        result["logs"].append(log_of(dpo, models))
        for _ in range(3 if with_evaluation else 0):
            result["evaluated"].append(log_of(dpo, models, forward_only=True))
        if with_evaluation:
            result["reported"].append(dpo.report_evaluation(models))
            assert dpo.report_evaluation(models) == {}
        if other is not None:
            result["other"] = log_of(other, other_models)
    gc.collect()
    result["kept"] = sum(isinstance(thing, LayerOutput) for thing in gc.get_objects())
    result["gradients"] = tiny.gradients(chunks)
    return result


def test_evaluation_and_another_model_do_not_disturb_training(workers):
    plain = workers.run(script, 2, False, False)
    busy = workers.run(script, 2, True, True)
    for one, other in zip(plain, busy, strict=True):
        assert one["logs"] == other["logs"] and one["kept"] == other["kept"] == 0
        for name, gradient in one["gradients"].items():
            assert torch.equal(gradient, other["gradients"][name]), name
    first, last = busy
    assert first["reported"] == last["reported"], "on every stage"
    # The weights did not change, so an evaluation has the values of the step.
    for log, reported in zip(last["logs"], last["reported"], strict=True):
        assert reported == pytest.approx(log, rel=RELATIVE)
    for evaluated in last["evaluated"]:
        assert "layer 1 loss" not in evaluated
        assert evaluated["final loss"] == pytest.approx(last["logs"][0]["final loss"], rel=RELATIVE)
    assert last["other"]["loss"] != pytest.approx(last["logs"][0]["loss"], rel=0.01)


# ---- the same pairs in every layout --------------------------------------------------------------


def log_probabilities() -> dict[str, dict[int, Tensor]]:
    """Of all sequences of single turn, by layout and layer."""
    from megatron_idpo import PreferenceBatch
    from megatron_idpo.mcore.model.build import global_parameters

    tiny_chunks = tiny.start()
    values = dict(global_parameters(tiny_chunks))
    results: dict[str, dict[int, Tensor]] = {}

    def score(chunks: list[Any], batches: list[Any]) -> dict[int, Tensor]:
        from megatron_idpo import Objective, attach

        dpo = attach(chunks, layers=LAYERS, objective=Objective(), vocab_size=tiny.VOCAB)
        with torch.no_grad(), dpo.collect_outputs() as outputs:
            for batch, inputs in batches:
                dpo.loss(batch, dpo.forward(chunks[0], batch, **inputs))
        dpo.detach()
        return tiny.by_layer(outputs, "logps_2P")

    results["rows"] = score(tiny_chunks, tiny.micro_batches(None))
    sequences = [
        stock_run.Sequence([*prompt, *answer], list(range(len(prompt), len(prompt) + len(answer))))
        for prompt, *answers in tiny.pairs()
        for answer in answers
    ]
    for name, is_packed in (("padded", False), ("packed", True)):
        chunks = stock.build(Layout(), num_layers=NUM_LAYERS, packed=is_packed)
        for key, parameter in global_parameters(chunks):
            own = values[key].detach()
            parameter.data[: len(own)] = own  # the vocabulary is padded by one row
        batches = []
        for index in range(0, len(sequences), 4):
            four = sequences[index : index + 4]
            made = stock_run.packed(four) if is_packed else stock_run.padded(four, left=True)
            targets, inputs = made
            batches.append((PreferenceBatch(targets, index=index), inputs))
        results[name] = score(chunks, batches)
    return results


def test_the_same_pairs_have_the_same_losses_in_every_layout(workers):
    (results,) = workers.run(log_probabilities, 1)
    for layer, expected in results["rows"].items():
        assert len(expected) == 2 * tiny.PAIRS
        for name in ("padded", "packed"):
            difference = (results[name][layer] - expected).abs() / expected.abs()
            assert difference.max() <= RELATIVE, f"{name}, layer {layer}"


# ---- HybridModel ---------------------------------------------------------------------------------


def hybrid_chunks(layout: Layout, config: Any) -> list[Any]:
    """The layers of a `GPTModel` in halves: attention and MLP alternate. Local spec."""
    from dataclasses import replace

    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    whole = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention = replace(whole, mlp=IdentityOp, mlp_bda=IdentityFuncOp, pre_mlp_layernorm=IdentityOp)
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=whole.pre_mlp_layernorm, mlp=whole.mlp, mlp_bda=whole.mlp_bda
    )
    spec = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
    stages = layout.pipeline
    chunk = HybridModel(
        config=config,
        hybrid_stack_spec=spec,
        vocab_size=stock.PADDED_VOCAB,
        max_sequence_length=stock.MAX_POSITIONS,
        hybrid_layer_pattern="|".join(["*-" * (NUM_LAYERS // stages)] * stages),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    return [chunk]


def gpt_name(chunk: Any, name: str) -> str:
    """The name of a hybrid model's parameter in a `GPTModel`."""
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    if name.startswith("decoder.layers."):
        _, _, index, rest = name.split(".", 3)
        number = chunk.decoder.layers[int(index)].layer_number
        name = f"decoder.layers.{(number - 1) // 2}.{rest}"
    return name


def gradients_of_hybrid(stages: int, recompute: str) -> dict[str, Tensor]:
    """Gradients by the names of a `GPTModel`."""
    from dataclasses import replace
    from unittest.mock import patch

    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    case = Case(pipeline=stages)
    stock_run.start(case)
    fields = stock_run.RECOMPUTE[recompute]
    (twin, *_) = stock.build(case.layout, num_layers=2 * NUM_LAYERS, **fields)
    with patch.object(hybrid_block, "TENorm", WrappedTorchNorm):
        chunks = hybrid_chunks(case.layout, replace(twin.config))
        for name, parameter in chunks[0].named_parameters():
            parameter.data.copy_(stock.whole_weight(gpt_name(chunks[0], name), parameter))
        dpo = attached(chunks)
    assert dpo.num_layers == NUM_LAYERS and dpo.layers == list(LAYERS)
    models = tiny.wrap(dpo, chunks)
    outputs, _ = run_step(dpo, models, micro_batches((*LAYERS, NUM_LAYERS), case), case)
    assert len(outputs) == BATCHES * (3 if stages == 1 else 1 + torch.distributed.get_rank())
    return {
        gpt_name(chunks[0], name): parameter.main_grad.clone()
        for name, parameter in chunks[0].named_parameters()
        if not name.startswith("head_replica")
    }


def gradients_of_gpt() -> dict[str, Tensor]:
    case = Case()
    stock_run.start(case)
    chunks = stock.build(case.layout, num_layers=NUM_LAYERS)
    dpo = attached(chunks)
    run_step(dpo, tiny.wrap(dpo, chunks), micro_batches((*LAYERS, NUM_LAYERS), case), case)
    return tiny.gradients(chunks)


@pytest.mark.parametrize(("stages", "recompute"), [(1, "uniform-3"), (2, "off")])
def test_hybrid_model_has_the_gradients_of_a_gpt_model(workers, stages, recompute):
    (expected,) = workers.run(gradients_of_gpt, 1)
    gradients = tiny.merged(workers.run(gradients_of_hybrid, stages, stages, recompute))
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        relative = (gradients[name] - gradient).norm() / gradient.norm()
        assert relative <= RELATIVE, f"{name}: {relative:.1e}"
