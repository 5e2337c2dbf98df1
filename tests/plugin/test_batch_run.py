"""A global batch through an attached model: what its layers say, what it learns, in which mode."""

from typing import Any

import pytest
import torch

from megatron_idpo.mcore.parallel.layout import Layout
from megatron_idpo.objective.dpo import Objective

from . import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

TAPS = (1, 3)


def batch_of(rows: Any) -> Any:
    """A batch of these rows of pairs, `tiny.PAIRS` in all."""
    import numpy as np

    from megatron_idpo.data.packing.batches import Batch
    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.data.tokenize.pair import Pair

    tokenised = [
        Pair(n, *(np.array(part, dtype=np.int32) for part in pair))
        for n, pair in enumerate(tiny.pairs())
    ]
    built = tuple(Row.build([tokenised[n] for n in row], tiny.ROW_TOKENS, 0) for row in rows)
    return Batch(
        rows=built, num_pairs=tiny.PAIRS, consumed_pairs=0, used_tokens=0, computed_tokens=0
    )


def said(layout: Layout, how: str) -> dict[str, Any]:
    """This rank's outputs, gradients and modes: of `run_batch`, and of the micro-batches."""
    from megatron_idpo.plugin.attach import attach
    from megatron_idpo.plugin.batch_run import logps_by_row, run_batch

    chunks = tiny.start(layout)
    dpo = attach(
        chunks,
        layers=TAPS,
        objective=Objective(beta=0.5, intermediate_weight=0.4),
        vocab_size=tiny.VOCAB,
    )
    wrapped = tiny.wrap(dpo, chunks)
    modes: set[bool] = set()
    for chunk in chunks:
        for module in chunk.modules():
            module.register_forward_pre_hook(lambda one, _: modes.add(one.training))
    batch, layers = batch_of(tiny.PAIRS_BY_ROW), (*TAPS, tiny.NUM_LAYERS)
    everything = tiny.references(layers)
    sequences = [[2 * n + side for n in row for side in (0, 1)] for row in tiny.PAIRS_BY_ROW]
    reference = [
        {layer: logps[torch.tensor(row, dtype=torch.long)] for layer, logps in everything.items()}
        for row in sequences
    ]
    arguments: dict[str, Any] = {
        "train": {"reference": reference, "training": True},
        "free": {"reference": None, "training": True, "reference_free": True},
        "read": {"reference": reference},
        "score": {"reference": None},
    }[how]
    outputs = run_batch(dpo, wrapped, batch, **arguments)
    found = {
        "order": [(output.micro_batch, output.layer) for output in outputs],
        "logps": tiny.by_layer(outputs, "logps_2P"),
        "has_loss": {output.loss_P is not None for output in outputs},
        "gradients": tiny.gradients(chunks),
        "modes": modes,
        "by_row": logps_by_row(outputs, len(batch.rows)),
    }
    if found["has_loss"] == {True}:
        found["losses"] = tiny.by_layer(outputs, "loss_P")
    return found


def plain(layout: Layout) -> dict[str, Any]:
    """The same by the schedule itself."""
    from megatron_idpo.plugin.attach import attach

    chunks = tiny.start(layout)
    dpo = attach(
        chunks,
        layers=TAPS,
        objective=Objective(beta=0.5, intermediate_weight=0.4),
        vocab_size=tiny.VOCAB,
    )
    wrapped = tiny.wrap(dpo, chunks)
    rows = tiny.micro_batches(tiny.references((*TAPS, tiny.NUM_LAYERS)))
    tiny.run(dpo, wrapped, rows)
    outputs = dpo.take_outputs(len(rows))
    return {
        "losses": tiny.by_layer(outputs, "loss_P"),
        "logps": tiny.by_layer(outputs, "logps_2P"),
        "gradients": tiny.gradients(chunks),
    }


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)], ids=["one", "pipeline"])
def test_training_is_the_schedules(workers, layout):
    ours = workers.run(said, layout.pipeline, layout, "train")
    theirs = workers.run(plain, layout.pipeline, layout)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine["order"] == sorted(mine["order"]) and mine["modes"] == {True}
        for what, tensors in expected.items():
            assert mine[what].keys() == tensors.keys()
            assert all(torch.equal(mine[what][name], one) for name, one in tensors.items()), what
        assert any(one.any() for one in mine["gradients"].values())


@pytest.mark.parametrize("how", ["read", "score"])
def test_reading_learns_nothing_and_drops_nothing_out(workers, how):
    (training,), (reading,) = (workers.run(said, 1, Layout(), which) for which in ("train", how))
    assert reading["modes"] == {False}
    assert not any(one.any() for one in reading["gradients"].values())
    assert reading["has_loss"] == {how == "read"}
    for layer, logps in training["logps"].items():
        assert torch.equal(reading["logps"][layer], logps)


def test_without_a_reference_its_log_probabilities_are_zero(workers):
    (free,) = workers.run(said, 1, Layout(), "free")
    for layer, loss_P in free["losses"].items():
        difference = free["logps"][layer][0::2] - free["logps"][layer][1::2]
        expected = -torch.nn.functional.logsigmoid(0.5 * difference)
        torch.testing.assert_close(loss_P, expected)


def test_log_probabilities_by_row_are_a_reference(workers):
    (scored,) = workers.run(said, 1, Layout(), "score")
    by_row = scored["by_row"]
    assert len(by_row) == len(tiny.PAIRS_BY_ROW)
    for row, logps in zip(tiny.PAIRS_BY_ROW, by_row, strict=True):
        assert {layer: one.shape for layer, one in logps.items()} == dict.fromkeys(
            (1, 3, tiny.NUM_LAYERS), (2 * len(row),)
        )
    for layer, expected in scored["logps"].items():
        assert torch.equal(torch.cat([logps[layer] for logps in by_row]), expected)
