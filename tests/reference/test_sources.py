"""Sources of reference log-probabilities: equal values, on the right rows, layers and stages."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.pairs import Pair
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.reference.sources import CachedReference, NoReference
from tests.plugin import tiny_megatron as tiny_model
from tests.plugin.tiny_megatron import batch_of

from ..train.tiny_run import LORA, NUM_LAYERS
from .tiny_cache import Files, logps, score_config


def row(*indices: int) -> Row:
    """A row of these pairs."""
    tokens = np.arange(2)
    return Row.build([Pair(index, tokens, tokens, tokens) for index in indices], 32, 0)


def test_cached_reference_returns_the_pairs_of_each_row() -> None:
    rows = (row(7, 2, 9), row(), row(0))
    batch = Batch(
        rows=rows, num_pairs=4, consumed_pairs=4, used_tokens=0, chosen_tokens=0, computed_tokens=0
    )
    by_row = CachedReference((2, 4), logps()).logps(batch)
    assert len(by_row) == 3
    for each, by_layer in zip(rows, by_row, strict=True):
        assert list(by_layer) == [2, 4]
        for at, layer in enumerate((2, 4)):
            expected = logps()[each.pair_index_P, at].ravel()  # chosen, rejected, chosen, ...
            assert by_layer[layer].dtype == torch.float32
            np.testing.assert_array_equal(by_layer[layer].numpy(), expected)


def test_cached_and_no_reference_need_no_forward_pass() -> None:
    assert not CachedReference.needs_forward and not CachedReference.is_reference_free
    assert not NoReference.needs_forward and NoReference.is_reference_free
    assert NoReference().logps(None) is None  # type: ignore[arg-type]


# ---- live references ----------------------------------------------------------------------------

LAYERS = (1, 3)


def attached(chunks: list[Any], **objective: Any) -> Any:
    from megatron_idpo.plugin.attach import attach

    return attach(
        chunks, layers=LAYERS, objective=Objective(**objective), vocab_size=tiny_model.VOCAB
    )


def compute_logps(layout: Layout, kind: str) -> dict[str, Any]:
    """By row: log-probabilities of a reference, of the bare model, and of the trained one."""
    from megatron_idpo.config.lora import LoraConfig
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.plugin.batch_run import logps_by_row, run_batch
    from megatron_idpo.reference.sources import AdapterOff, Resident
    from megatron_idpo.testing import tiny_hf_config

    batch = batch_of(tiny_model.PAIRS_BY_ROW)
    chunks = tiny_model.start(layout)
    bare = attached(chunks)
    expected = logps_by_row(run_batch(bare, chunks, batch, None), len(batch.rows))
    bare.detach()
    reference: Any
    if kind == "adapter_off":
        architecture = Architecture.from_hf(tiny_hf_config("llama", **tiny_model.SIZES))
        adapters = add_adapters(chunks, architecture, LoraConfig(rank=2, dropout=0.5))
        for tensor in adapters.tensors():
            tensor.parameter.data.fill_(0.1)
        dpo = attached(chunks)
        wrapped = tiny_model.wrap(dpo, chunks)
        reference = AdapterOff(dpo, wrapped, adapters)
        trained = logps_by_row(run_batch(dpo, wrapped, batch, None), len(batch.rows))
        logps = reference.logps(batch)
        again = logps_by_row(run_batch(dpo, wrapped, batch, None), len(batch.rows))
        assert all(
            torch.equal(one[layer], two[layer])
            for one, two in zip(trained, again, strict=True)
            for layer in one
        ), "the adapters are enabled again"
    else:
        dpo = attached(chunks)
        reference = Resident(dpo, chunks)
        trained = []
        with torch.enable_grad():
            logps = reference.logps(batch)
    assert (reference.is_reference_free, reference.needs_forward) == (False, True)
    assert not any(values.requires_grad for row in logps for values in row.values())
    return {"expected": expected, "logps": logps, "trained": trained}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["adapter_off", "resident"])
@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)], ids=["single", "pipeline"])
def test_live_reference_equals_the_base_model(workers, layout, kind):
    """Bitwise, for this stage's layers, in every row."""
    layers = set()
    for rank in workers.run(compute_logps, layout.pipeline, layout, kind):
        assert len(rank["logps"]) == len(tiny_model.PAIRS_BY_ROW)
        for actual, expected in zip(rank["logps"], rank["expected"], strict=True):
            assert actual.keys() == expected.keys()
            layers |= actual.keys()
            assert all(torch.equal(actual[layer], expected[layer]) for layer in expected)
        if kind == "adapter_off":
            first = rank["trained"][0]
            assert not any(torch.equal(first[n], rank["expected"][0][n]) for n in first)
    assert layers == {*LAYERS, tiny_model.NUM_LAYERS}


Logps = dict[tuple[str, int, int], torch.Tensor]


def all_sources(file: str) -> tuple[Logps, dict[str, bool]]:
    """On every rank: log-probabilities by (source, row, layer), and where offloaded weights are."""
    from megatron_idpo.cli.train import OPTIONAL, REQUIRED
    from megatron_idpo.config.load import load_config
    from megatron_idpo.convert.model_source import FrozenModel, open_model
    from megatron_idpo.data.packing.batches import build_batch
    from megatron_idpo.data.run_pairs import load_run_pairs, row_settings
    from megatron_idpo.mcore.parallel.groups import rank_coordinates
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
    from megatron_idpo.reference import sources
    from megatron_idpo.train.policy import build_policy
    from megatron_idpo.train.references import reference_in_policy

    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    pairs = load_run_pairs(config).train
    with distributed_world() as world, running_layout(config.layout):
        model = FrozenModel.of(open_model(config.model.path))
        rows = row_settings(config, world.size, data_rank=rank_coordinates().dp_rank)
        batch = build_batch(pairs, np.arange(8), rows, consumed_pairs=0)
        logps: Logps = {}

        def record(name: str, reference: Any) -> None:
            for row, by_layer in enumerate(reference.logps(batch)):
                logps.update({(name, row, layer): value for layer, value in by_layer.items()})

        chunks, dpo = sources.frozen_model(config, model, show_progress=False)
        record("resident", sources.Resident(dpo, chunks))
        locations = record_offloaded(sources, dpo, chunks, record)
        policy = build_policy(config, model, show_progress=False)
        if policy.adapters is not None:
            for _, parameter in policy.adapters.parameters():
                parameter.data.fill_(0.1)
        record("start", reference_in_policy(policy, model))
    return logps, locations


def record_offloaded(sources: Any, dpo: Any, chunks: Any, record: Any) -> dict[str, bool]:
    """Run an offloaded model twice, and track the address of one of its weights."""
    first = next(chunks[0].parameters())
    on_device, during_passes = first.data_ptr(), []
    offloaded = sources.Offloaded(dpo, chunks)
    in_host = first.data_ptr()
    ordinary = sources.run_batch

    def run_batch(*args: Any) -> Any:
        during_passes.append(first.data_ptr())
        return ordinary(*args)

    with patch.object(sources, "run_batch", run_batch):
        record("offloaded", offloaded)
        record("offloaded again", offloaded)
    return {
        "on the host": in_host != on_device,
        "copied in for each pass": len(during_passes) == 2 and in_host not in during_passes,
        "on the host again": first.data_ptr() == in_host,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_all_sources_are_bitwise_equal(
    tiny: Files, workers: Any, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """Also the policy with adapters that are not zero any more, in a pipeline."""
    sections = {} if lora is None else {"lora": lora}
    file = score_config(tiny, tmp_path / "run", layout={"pipeline": 2}, **sections)
    layers = set()
    for values, locations in workers.run(all_sources, 2, file):
        assert all(locations.values()), locations
        for (name, row, layer), value in values.items():
            layers.add(layer)
            assert value.dtype == torch.float32
            assert torch.equal(value, values["resident", row, layer]), (name, row, layer)
        names = {name for name, _, _ in values}
        assert names == {"resident", "offloaded", "offloaded again", "start"}
    assert layers == {1, 3, NUM_LAYERS}


def build_frozen_model(file: str, overrides: list[str]) -> dict[str, Any]:
    """On a rank: properties of the loaded model."""
    from megatron_idpo.config.load import load_config
    from megatron_idpo.convert.model_source import FrozenModel, open_model
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
    from megatron_idpo.reference.sources import frozen_model

    sections = ("model", "data", "objective", "layout")
    config = load_config(file, overrides, optional=sections)
    with distributed_world(), running_layout(config.layout):
        model = FrozenModel.of(open_model(config.model.path))
        chunks, dpo = frozen_model(config, model, show_progress=False)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        return {
            "layers": dpo.layers,
            "dtypes": {parameter.dtype for parameter in parameters},
            "is frozen": not any(parameter.requires_grad for parameter in parameters),
            "is finite": all(bool(torch.isfinite(weight).all()) for weight in parameters),
        }


@pytest.mark.distributed
def test_frozen_model_has_the_configured_layers_and_dtype(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    file = score_config(tiny, tmp_path / "run")
    overrides = ["objective.layers=[2]", "model.dtype=bf16"]
    [model] = workers.run(build_frozen_model, 1, file, overrides)
    assert model["layers"] == [2]
    assert model["dtypes"] == {torch.bfloat16}
    assert model["is frozen"] and model["is finite"]
