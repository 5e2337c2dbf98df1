"""Mistakes that megatron-core does not see, and that would give a wrong gradient without an error.

As in `test_user_errors.py`, workers return the messages of the mistakes that they make.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout

from . import tiny_megatron as tiny
from .test_user_errors import LAYERS, PLAIN, attached, check, message

pytestmark = pytest.mark.distributed

ATOL = 1e-6
"""A weight that is not stale gives the same log-probabilities, up to the order of sums."""


# ---- logits that are changed ---------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """An output layer in a wrapper, as a library for adapters leaves it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.to_wrap = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits, bias = self.to_wrap(*args, **kwargs)
        return logits + 1.0, bias


def subclasses(chunk: Any) -> dict[str, type]:
    """As Megatron-Bridge builds Gemma 2, and two other ways to scale logits."""

    class Capped(type(chunk.output_layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits, bias = super().forward(*args, **kwargs)
            return 30.0 * torch.tanh(logits / 30.0), bias

    class ScaledInside(type(chunk)):  # type: ignore[misc]
        def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
            return super()._postprocess(*args, **kwargs) * 0.5

    class ScaledOutside(type(chunk)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 0.5

    return {"layer": Capped, "inside": ScaledInside, "outside": ScaledOutside}


def changed_logits() -> dict[str, str]:
    tiny.start()
    ((batch, inputs), *_) = tiny.micro_batches(tiny.references(LAYERS))
    answers = {}

    def loss_of(chunk: Any, dpo: Any) -> str:
        return message(lambda: dpo.loss(batch, dpo.forward(chunk, batch, **inputs)))

    def fresh() -> Any:
        return tiny.chunks_of(PLAIN)[0]

    chunk = fresh()
    kinds = subclasses(chunk)
    chunk.output_layer.__class__ = kinds["layer"]
    answers["soft-cap in the output layer"] = message(lambda: attached([chunk]))
    chunk = fresh()
    chunk.__class__ = kinds["inside"]
    answers["scale in _postprocess"] = message(lambda: attached([chunk]))
    chunk = fresh()
    chunk.output_layer = Adapted(chunk.output_layer)
    answers["adapter before"] = message(lambda: attached([chunk]))
    chunk = fresh()
    chunk.output_layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
    answers["hook before the output layer"] = message(lambda: attached([chunk]))

    chunk = fresh()
    chunk.__class__ = kinds["outside"]
    answers["scale after forward"] = loss_of(chunk, attached([chunk]))
    chunk = fresh()
    dpo = attached([chunk])
    answers["as it is"] = loss_of(chunk, dpo)
    hook = chunk.output_layer.register_forward_hook(lambda *hooked: (hooked[2][0] * 0.5, None))
    answers["hook after the output layer"] = loss_of(chunk, dpo)
    hook.remove()
    hook = chunk.register_forward_hook(lambda *hooked: hooked[2].mul_(0.5))
    answers["in place, after the model"] = loss_of(chunk, dpo)
    hook.remove()
    chunk.output_layer = Adapted(chunk.output_layer)
    answers["adapter after"] = loss_of(chunk, dpo)
    return answers


EXPECTED_OF_LOGITS = {
    "soft-cap in the output layer": ("ConfigError chunks[0]: Capped may change logits",),
    "scale in _postprocess": ("chunks[0]: ScaledInside._postprocess may change logits",),
    "adapter before": ("chunks[0]: has a Adapted as output layer", "which taps do not run"),
    "hook before the output layer": ("chunks[0]: hooks of the output layer may change logits",),
    "scale after forward": ("ConfigError AttachedDpo.loss: an output that was changed",),
    "as it is": ("no error",),
    "hook after the output layer": ("AttachedDpo.loss: an output that was changed",),
    "in place, after the model": ("AttachedDpo.loss: an output that was changed",),
    "adapter after": ("ConfigError output_layer: was replaced by a Adapted after attach",),
}


def test_changed_logits_are_an_error(workers):
    (answers,) = workers.run(changed_logits, 1)
    check(answers, EXPECTED_OF_LOGITS)


# ---- the wrong batch, the wrong number, the wrong model ------------------------------------------


def same_shape_batches(order: Sequence[int]) -> list[Any]:
    """Micro-batches of one pair each that differ in their tokens only, in this order."""
    from megatron_idpo import PreferenceBatch, Targets

    ((_, inputs), *_) = tiny.micro_batches(None)
    is_answer_1T = torch.arange(tiny.ROW_TOKENS)[None] % 12 > 8
    made = []
    for position, seed in enumerate(order):
        tokens_1T = inputs["input_ids"].roll(seed, dims=1)
        batch = PreferenceBatch(
            Targets.from_packed(tokens_1T, [0, 12, 24], is_answer_1T),
            reference_logps={layer: torch.full((2,), -20.0) for layer in LAYERS},
            index=position,
            num_micro_batches=len(order),
            global_pairs=len(order),
        )
        made.append((batch, {**inputs, "input_ids": tokens_1T}))
    return made


def wrong_use() -> dict[str, str]:
    chunks = tiny.start()
    dpo, other = attached(chunks), attached(tiny.chunks_of(PLAIN))
    models = tiny.wrap(dpo, chunks)
    batches = same_shape_batches([0, 1])
    ((first, inputs), (second, _)) = batches

    def step(**fields: Any) -> str:
        changed = [(replace(batch, **fields), inputs) for batch, inputs in batches]
        return message(lambda: tiny.run(dpo, models, changed))

    def call(**changes: Any) -> Tensor:
        own = dpo.model_kwargs(first, inputs["packed_seq_params"])
        output: Tensor = chunks[0](**{**inputs, **own, **changes})
        return output

    (equal, _), *_ = same_shape_batches([0])
    with torch.no_grad():
        outputs = [dpo.forward(chunks[0], batch, **own) for batch, own in batches]
        answers = {
            "loss of another batch": message(lambda: dpo.loss(second, outputs[0])),
            "of an equal batch": message(lambda: dpo.loss(equal, outputs[0])),
            "of the other output": message(lambda: dpo.loss(second, outputs[1].view(1, 2)[0])),
        }

    chunks[0].config.finalize_model_grads_func = other.finalize_model_grads
    answers["other model's finalize"] = step()
    dpo.discard_step()
    chunks[0].config.finalize_model_grads_func = dpo.finalize_model_grads
    answers["first step"] = step()
    answers["other pairs in a later step"] = step(global_pairs=8)

    for name in ("unfinished", "discarded"):
        dpo.loss(first, dpo.forward(chunks[0], first, **inputs))  # then an exception, no backward
        if name == "discarded":
            dpo.discard_step()
        answers[name] = step()
    answers["labels by position"] = message(lambda: positional(chunks[0], dpo, first, inputs))
    embedded = torch.zeros(tiny.ROW_TOKENS, 1, tiny.SIZES["hidden_size"])
    for parameter in chunks[0].parameters():
        parameter.requires_grad_(False)
    answers["no gradient"] = message(partial(call, decoder_input=embedded))
    answers["with gradient"] = message(partial(call, decoder_input=embedded.requires_grad_()))
    dpo.detach()
    answers["detached"] = message(lambda: dpo.model_kwargs(first))
    return answers


def positional(chunk: Any, dpo: Any, batch: Any, inputs: dict[str, Any]) -> None:
    own = dpo.model_kwargs(batch, inputs["packed_seq_params"])
    tokens, ids = inputs["input_ids"], inputs["position_ids"]
    output = chunk(tokens, ids, None, None, tokens, **own)
    assert output.shape == (2,)


EXPECTED_OF_USE = {
    "loss of another batch": (
        "AttachedDpo.loss: the output of another micro-batch for micro-batch 1",
        "model_kwargs",
    ),
    "of an equal batch": ("no error",),
    "of the other output": ("no error",),
    "other model's finalize": (
        "AttachedDpo.finalize_model_grads: recorded no output",
        "the one of the model that runs",
    ),
    "first step": ("no error",),
    "other pairs in a later step": ("global_pairs: is 8, but the step had 2 pairs",),
    "unfinished": (
        "has more than 2 outputs since gradients were finished",
        "call AttachedDpo.discard_step where an exception ends a step",
        "evaluate under torch.no_grad",
    ),
    "discarded": ("no error",),
    "labels by position": ("no error",),
    "no gradient": ("layer 2: needs no gradient", "call decoder_input.requires_grad_()"),
    "with gradient": ("no error",),
    "detached": ("AttachedDpo.model_kwargs: was detached", "attach again"),
}


def test_wrong_use_of_a_batch_is_an_error(workers):
    (answers,) = workers.run(wrong_use, 1)
    check(answers, EXPECTED_OF_USE)


def fully_sharded() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (chunk,) = chunks = tiny.start()
    dpo = attached(chunks)
    fully_shard(chunk, mesh=init_device_mesh("cpu", (1,)))
    ((batch, inputs), *_) = tiny.micro_batches(tiny.references(LAYERS))
    return message(lambda: dpo.forward(chunk, batch, **inputs))


def test_parameters_sharded_by_torch_are_an_error(workers):
    (answer,) = workers.run(fully_sharded, 1)
    assert "model: is sharded by torch FSDP2" in answer and "DistributedDataParallel" in answer


# ---- over two ranks ------------------------------------------------------------------------------


def in_another_order(layout: Layout) -> list[str]:
    """The second rank reads its micro-batches in another order, also in a later step."""
    chunks = tiny.start(layout)
    dpo = attached(chunks)
    models = tiny.wrap(dpo, chunks)
    order = [0, 1, 2] if torch.distributed.get_rank() == 0 else [2, 0, 1]

    def step(order: Sequence[int]) -> str:
        return message(lambda: tiny.run(dpo, models, same_shape_batches(order)))

    first, good = step(order), step([0, 1, 2])
    unchecked = step(order)
    dpo.check_next_step()
    return [good, unchecked, first, step(order)]


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(tensor=2)], ids=["PP2", "TP2"])
def test_ranks_that_read_different_micro_batches_raise_everywhere(workers, layout):
    for good, unchecked, *answers in workers.run(in_another_order, 2, layout):
        assert good == unchecked == "no error", "only the first step is compared, unless asked for"
        for answer in answers:
            assert "data_iterator: ranks that need the same micro-batches" in answer
            assert "first at index 0" in answer and "in the same order" in answer


def after_a_step() -> dict[int, float]:
    """How far log-probabilities move, by layer, once every parameter has been gathered."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chunks = tiny.start()
    dpo = attached(chunks)
    flags = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    # Small buckets: the output weight is not gathered with the first one.
    (model,) = tiny.wrap(dpo, chunks, overlap_grad_reduce=True, bucket_size=1000, **flags)
    config = OptimizerConfig(optimizer="adam", lr=0.1, **flags)
    optimizer = get_megatron_optimizer(config, [model])
    chunks[0].config.no_sync_func = model.no_sync
    batches = tiny.micro_batches(tiny.references(LAYERS))
    tiny.run(dpo, [model], batches)
    optimizer.step()

    def logps() -> dict[int, Tensor]:
        outputs = tiny.run(dpo, [model], batches, forward_only=True)
        return tiny.by_layer(outputs, "logps_2P")

    first = logps()
    model.disable_forward_pre_hook(param_sync=True)
    second = logps()
    return {layer: float((first[layer] - second[layer]).abs().max()) for layer in first}


def test_evaluation_after_an_overlapped_step_reads_gathered_weights(workers):
    for moved in workers.run(after_a_step, 2):
        assert set(moved) == set(LAYERS) and max(moved.values()) <= ATOL


def in_other_dtype() -> tuple[str, set[torch.dtype]]:
    """Weights are cast before attaching, without `params_dtype`."""
    chunks = tiny.start(Layout(pipeline=2))
    for chunk in chunks:
        chunk.bfloat16()
    dpo = attached(chunks, [1])
    dtypes = {parameter.dtype for chunk in chunks for parameter in chunk.parameters()}
    return message(dpo._shared_head.check_equal), dtypes


def test_copies_of_the_head_have_its_dtype(workers):
    for answer, dtypes in workers.run(in_other_dtype, 2):
        assert answer == "no error" and dtypes == {torch.bfloat16}
