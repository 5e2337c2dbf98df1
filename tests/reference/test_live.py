"""References computed while training: the right model, in eval mode, on every stage."""

from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.objective.dpo import Objective
from tests.plugin import tiny_megatron as tiny
from tests.plugin.tiny_megatron import batch_of

pytestmark = pytest.mark.distributed

LAYERS = (1, 3)


def attached(chunks: list[Any], **objective: Any) -> Any:
    from megatron_idpo.plugin.attach import attach

    return attach(chunks, layers=LAYERS, objective=Objective(**objective), vocab_size=tiny.VOCAB)


def answers(layout: Layout, kind: str) -> dict[str, Any]:
    """What a reference says, and what the bare model says; by row."""
    from megatron_idpo.config.lora import LoraConfig
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.plugin.batch_run import logps_by_row, run_batch
    from megatron_idpo.reference import sources as live
    from megatron_idpo.testing import tiny_hf_config

    batch = batch_of(tiny.PAIRS_BY_ROW)
    chunks = tiny.start(layout)
    bare = attached(chunks)
    expected = logps_by_row(run_batch(bare, chunks, batch, None), len(batch.rows))
    bare.detach()
    reference: Any
    if kind == "adapter_off":
        architecture = Architecture.from_hf(tiny_hf_config("llama", **tiny.SIZES))
        adapters = add_adapters(chunks, architecture, LoraConfig(rank=2, dropout=0.5))
        for one in adapters.tensors():
            one.parameter.data.fill_(0.1)
        dpo = attached(chunks)
        wrapped = tiny.wrap(dpo, chunks)
        reference = live.AdapterOff(dpo, wrapped, adapters)
        trained = logps_by_row(run_batch(dpo, wrapped, batch, None), len(batch.rows))
        found = reference.logps(batch)
        again = logps_by_row(run_batch(dpo, wrapped, batch, None), len(batch.rows))
        assert all(
            torch.equal(one[layer], two[layer])
            for one, two in zip(trained, again, strict=True)
            for layer in one
        ), "the adapters are on again"
    else:
        dpo = attached(chunks)
        reference = live.Resident(dpo, chunks)
        trained = []
        with torch.enable_grad():
            found = reference.logps(batch)
    assert (reference.is_reference_free, reference.needs_forward) == (False, True)
    assert not any(logps.requires_grad for row in found for logps in row.values())
    return {"expected": expected, "found": found, "trained": trained}


@pytest.mark.parametrize("kind", ["adapter_off", "resident"])
@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)], ids=["one", "pipeline"])
def test_it_is_the_model_without_what_is_learnt(workers, layout, kind):
    """To the bit, for this stage's layers, in every row."""
    layers = set()
    for rank in workers.run(answers, layout.pipeline, layout, kind):
        assert len(rank["found"]) == len(tiny.PAIRS_BY_ROW)
        for found, expected in zip(rank["found"], rank["expected"], strict=True):
            assert found.keys() == expected.keys()
            layers |= found.keys()
            assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        if kind == "adapter_off":
            first = rank["trained"][0]
            assert not any(torch.equal(first[n], rank["expected"][0][n]) for n in first)
    assert layers == {*LAYERS, tiny.NUM_LAYERS}


def test_no_reference():
    from megatron_idpo.reference.sources import NoReference

    none = NoReference()
    assert none.logps(None) is None  # type: ignore[arg-type]
    assert (none.is_reference_free, none.needs_forward) == (True, False)
