"""Roofline times: proportions that must hold, and FLOPs against those that training reports."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.plan.devices import DEVICES
from megatron_idpo.plan.step_time import attended_pairs, model_flops, row_time, step_time
from megatron_idpo.train.metrics.flops import BatchWork, ModelFlops, attended_keys, lora_weights
from megatron_idpo.train.metrics.peak_flops import peak_flops

from .layout_cases import MIXTRAL, llama
from .small_run import small_run

H100 = DEVICES["h100"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("experts", [{}, MIXTRAL])
def test_model_flops_equal_those_of_the_training_log(lora, experts):
    architecture = Architecture.from_hf(llama(4, 8, 2, 1, 16, head_dim=4, **experts))
    sizes = {name: getattr(architecture, name) for name in ("num_experts", "experts_per_token")}
    run = small_run(lora=lora, taps=(1,), row_tokens=64, rows=3, vocab_size=32000, **sizes)
    work = BatchWork(
        pairs=3, used_tokens=3 * 64, computed_tokens=0, response_tokens=3 * 48,
        attended=4 * 3 * attended_pairs(64, 0.75),
    )  # fmt: skip
    adapters = None
    if run.lora is not None:
        if experts:
            targets = {"target_parameters": EXPERT_PARAMETERS}
            run = replace(run, lora=run.lora.model_copy(update=targets))
        assert run.lora is not None
        ranks = {name: run.lora.rank_of(name) for name in run.lora.names}
        adapters = lora_weights(architecture, ranks)
    logged = ModelFlops(architecture=architecture, num_heads=2, adapter_weights=adapters)
    assert model_flops(run) == pytest.approx(logged.step(work))
    live = replace(logged, reference_forwards=1)
    assert model_flops(replace(run, reference="resident")) == pytest.approx(live.step(work))


def test_attended_pairs_are_those_of_the_mask():
    exact = attended_keys(np.array([[200, 300, 300]]), None)[0]
    assert attended_pairs(800, 0.75) == pytest.approx(exact, rel=0.01)


def test_peaks_equal_those_of_the_training_log():
    for name, device in DEVICES.items():
        assert peak_flops(f"NVIDIA {name.upper()}", torch.bfloat16) == device.peak_flops, name


def test_parts_add_up_to_the_step():
    run = small_run({"pipeline": 2}, world_size=4, taps=(1,), rows=8)
    time = step_time(run, H100)
    slowest = time.stages[time.slowest].total
    assert time.bubble == slowest
    assert time.step == pytest.approx(9 * slowest + time.data_traffic + time.update)
    assert time.pairs_per_s == pytest.approx(16 / time.step)


def test_a_stage_is_faster_with_fewer_layers_and_slower_with_taps():
    run = small_run({"pipeline": 2}, world_size=2)
    first = row_time(run, 0, H100)
    tapped = row_time(replace(run, taps=(1,)), 0, H100)
    assert first.heads == 0 and tapped.heads == row_time(run, 1, H100).heads > 0
    assert first.products == row_time(small_run(), 0, H100).products / 2


def test_training_all_weights_takes_half_as_many_products_again():
    large = {"hidden_size": 4096, "ffn_hidden_size": 16384}
    trained = row_time(small_run(**large), 0, H100)
    frozen = row_time(small_run(lora=True, **large), 0, H100)
    assert trained.products == pytest.approx(1.5 * frozen.products, rel=0.01)  # and adapters
    assert trained.heads == 2 * frozen.heads


def test_recomputing_every_layer_adds_a_forward_pass():
    run = replace(small_run(), recompute="full")
    found = row_time(run, 0, H100)
    assert found.recompute == pytest.approx(found.products / 3)


def test_interleaving_divides_the_bubble_and_traffic_between_nodes_is_slower():
    plain = small_run({"pipeline": 2}, world_size=16, rows=8)
    chunks = small_run({"pipeline": 2, "virtual_pipeline": 2}, world_size=16, rows=8)
    assert step_time(chunks, H100).bubble == pytest.approx(
        step_time(plain, H100).bubble / 2, rel=0.1
    )
    inside = row_time(small_run({"pipeline": 2}, world_size=8), 0, H100).pipeline_traffic
    between = row_time(small_run({"pipeline": 2}, world_size=16), 0, H100).pipeline_traffic
    assert between == pytest.approx(inside * H100.link_bytes_per_s / H100.network_bytes_per_s)


def test_sources_are_named():
    assert all(re.search("data sheet", device.source) for device in DEVICES.values())
