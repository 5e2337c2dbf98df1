"""`run_batch`: training, evaluation and scoring of one global batch."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.objective.dpo import Objective

from . import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

TAPS = (1, 3)
LAYERS = (*TAPS, tiny.NUM_LAYERS)
BETA = 0.5


def attached(layout: Layout) -> tuple[Any, list[Any], list[Any]]:
    from megatron_idpo.plugin.attach import attach

    chunks = tiny.start(layout)
    objective = Objective(beta=BETA, intermediate_weight=0.4)
    dpo = attach(chunks, layers=TAPS, objective=objective, vocab_size=tiny.VOCAB)
    return dpo, chunks, tiny.wrap(dpo, chunks)


def with_run_batch(layout: Layout, mode: str) -> dict[str, Any]:
    """This rank's outputs, gradients and module modes after `run_batch`."""
    from megatron_idpo.plugin.batch_run import logps_by_row, run_batch

    dpo, chunks, wrapped = attached(layout)
    training_flags: set[bool] = set()
    for chunk in chunks:
        for module in chunk.modules():
            module.register_forward_pre_hook(lambda m, _: training_flags.add(m.training))
    batch = tiny.batch_of(tiny.PAIRS_BY_ROW)
    sequences = [[2 * n + side for n in row for side in (0, 1)] for row in tiny.PAIRS_BY_ROW]
    reference = [
        {
            layer: logps[torch.tensor(row, dtype=torch.long)]
            for layer, logps in tiny.references(LAYERS).items()
        }
        for row in sequences
    ]
    arguments: dict[str, Any] = {
        "train": {"reference": reference, "training": True},
        "reference_free": {"reference": None, "training": True, "reference_free": True},
        "evaluate": {"reference": reference},
        "score": {"reference": None},
    }[mode]
    outputs = run_batch(dpo, wrapped, batch, **arguments)
    result = {
        "order": [(output.micro_batch, output.layer) for output in outputs],
        "logps": tiny.by_layer(outputs, "logps_2P"),
        "has_loss": {output.loss_P is not None for output in outputs},
        "gradients": tiny.gradients(chunks),
        "training_flags": training_flags,
        "by_row": logps_by_row(outputs, len(batch.rows)),
    }
    if result["has_loss"] == {True}:
        result["losses"] = tiny.by_layer(outputs, "loss_P")
    return result


def with_schedule(layout: Layout) -> dict[str, Any]:
    """The same by calling megatron-core's schedule directly."""
    dpo, chunks, wrapped = attached(layout)
    rows = tiny.micro_batches(tiny.references(LAYERS))
    outputs = tiny.run(dpo, wrapped, rows)
    return {
        "losses": tiny.by_layer(outputs, "loss_P"),
        "logps": tiny.by_layer(outputs, "logps_2P"),
        "gradients": tiny.gradients(chunks),
    }


@pytest.fixture(scope="module")
def one_rank(workers):
    """Results of `with_run_batch` on one rank, by mode."""
    results: dict[str, Any] = {}

    def run(mode: str) -> dict[str, Any]:
        if mode not in results:
            (results[mode],) = workers.run(with_run_batch, 1, Layout(), mode)
        return results[mode]

    return run


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)], ids=["one-rank", "PP2"])
def test_training_equals_the_schedule_bitwise(workers, layout):
    results = workers.run(with_run_batch, layout.pipeline, layout, "train")
    expected_by_rank = workers.run(with_schedule, layout.pipeline, layout)
    for result, expected in zip(results, expected_by_rank, strict=True):
        assert result["order"] == sorted(result["order"]) and result["training_flags"] == {True}
        for kind, tensors in expected.items():
            assert result[kind].keys() == tensors.keys()
            assert all(torch.equal(result[kind][name], t) for name, t in tensors.items()), kind
        assert any(gradient.any() for gradient in result["gradients"].values())


@pytest.mark.parametrize("mode", ["evaluate", "score"])
def test_evaluation_has_no_gradients_and_no_dropout(one_rank, mode):
    result = one_rank(mode)
    assert result["training_flags"] == {False}
    assert not any(gradient.any() for gradient in result["gradients"].values())
    assert result["has_loss"] == {mode == "evaluate"}
    for layer, logps in one_rank("train")["logps"].items():
        assert torch.equal(result["logps"][layer], logps)


def test_reference_free_losses_use_zero_reference_log_probabilities(one_rank):
    result = one_rank("reference_free")
    for layer, loss_P in result["losses"].items():
        difference = result["logps"][layer][0::2] - result["logps"][layer][1::2]
        expected = -torch.nn.functional.logsigmoid(BETA * difference)
        torch.testing.assert_close(loss_P, expected)


def test_log_probabilities_by_row_have_the_form_of_a_reference(one_rank):
    scored = one_rank("score")
    by_row = scored["by_row"]
    assert len(by_row) == len(tiny.PAIRS_BY_ROW)
    for row, logps in zip(tiny.PAIRS_BY_ROW, by_row, strict=True):
        assert {layer: one.shape for layer, one in logps.items()} == dict.fromkeys(
            LAYERS, (2 * len(row),)
        )
    for layer, expected in scored["logps"].items():
        assert torch.equal(torch.cat([logps[layer] for logps in by_row]), expected)
