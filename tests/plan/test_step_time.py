"""Roofline times: proportions that must hold, and FLOPs against those that training reports."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.plan.devices import DEVICES, device_of
from megatron_idpo.plan.row_time import attended_pairs, row_time
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_rows import step_rows
from megatron_idpo.plan.step_time import model_flops, step_time
from megatron_idpo.plan.traffic import all_to_all_s, collective_s
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


def test_a_group_with_several_ranks_in_a_node_sends_through_as_many_ports():
    def seconds(stride: int, size: int) -> float:
        return collective_s(1e9, stride=stride, size=size, device=H100)

    one_port = seconds(8, 8)
    assert one_port == pytest.approx(1e9 / (H100.network_bytes_per_s * 0.75))
    assert seconds(4, 8) == pytest.approx(one_port / 2)
    assert seconds(1, 64) == pytest.approx(one_port / 8)
    assert seconds(1, 8) == pytest.approx(1e9 / (H100.link_bytes_per_s * 0.75))


def test_tokens_for_experts_of_the_same_node_do_not_leave_it():
    whole = all_to_all_s(1e9, stride=8, size=8, device=H100)
    assert all_to_all_s(1e9, stride=1, size=16, device=H100) == pytest.approx(whole * 8 / 15)
    assert all_to_all_s(1e9, stride=1, size=8, device=H100) < whole / 5


def test_context_parallel_ranks_send_keys_and_values_three_times_per_layer():
    run = small_run({"context": 8}, world_size=8, row_tokens=1 << 16)
    found = row_time(run, 0, H100)
    # 4 layers, keys and values of 4 features, 2 bytes, seven eighths from others.
    sent = 4 * 3 * 2 * (1 << 16) * 4 * 2 * 7 / 8
    assert found.context_traffic == pytest.approx(sent / (H100.link_bytes_per_s * 0.75))
    recomputed = row_time(replace(run, recompute="full"), 0, H100)
    assert recomputed.context_traffic == found.context_traffic
    # Longer than the host needs to launch the kernels of a model this small.
    slow = replace(H100, link_bytes_per_s=H100.link_bytes_per_s / 10_000)
    assert step_time(run, slow).step > step_time(run, H100).step


def test_gathers_of_all_weights_but_not_of_adapters_overlap_with_the_forward_pass():
    large = {"hidden_size": 4096, "ffn_hidden_size": 16384, "row_tokens": 4096}
    full, adapters = (small_run(lora=lora, world_size=8, **large) for lora in (False, True))
    assert step_time(full, H100).data_traffic == 0
    assert step_time(adapters, H100).data_traffic > 0


def test_gathers_of_pipeline_stages_are_not_overlapped():
    large = {"hidden_size": 4096, "ffn_hidden_size": 16384, "row_tokens": 4096}
    run = small_run({"pipeline": 2}, world_size=16, **large)
    assert step_time(run, H100).data_traffic > 0


def test_context_parallelism_and_selective_recomputation_repeat_attention():
    run = small_run(row_tokens=1 << 16)
    plain = row_time(run, 0, H100).attention
    selective = row_time(replace(run, recompute="selective"), 0, H100).attention
    split = row_time(small_run({"context": 2}, world_size=2, row_tokens=1 << 16), 0, H100).attention
    assert selective == pytest.approx(plain * 4.5 / 3.5)
    assert split == pytest.approx(selective / 2)


def run_of_pairs(pairs: int, layout: dict[str, int], world_size: int) -> RunSizes:
    run = small_run(layout, world_size=world_size, row_tokens=4096)
    assumed = replace(run.assumed, pair_tokens=800)
    return replace(run, trim_tokens=128, global_batch_pairs=pairs, assumed=assumed)


def test_rows_are_those_of_the_packer():
    # Two pairs and a half of 800 in each of two rows: trimmed to a half of 4096.
    rows = step_rows(run_of_pairs(32, {"pipeline": 2}, 16))
    assert rows.row_tokens % 1024 == 0
    assert rows.rows * rows.row_tokens >= 4 * 800
    assert rows.used_share == pytest.approx(4 * 800 / (rows.rows * rows.row_tokens), rel=0.02)
    # A stage alone trims each row; the pipeline pads all to the fullest one.
    alone = step_rows(run_of_pairs(32, {}, 8))
    assert alone.used_share >= rows.used_share
    # On a CPU trimming is fine.
    assert step_rows(run_of_pairs(32, {}, 8), is_gpu=False).used_share > alone.used_share
    assert step_rows(run_of_pairs(4096, {}, 8)).rows > 60


def test_interleaving_rounds_rows_up_to_the_stages():
    layout = {"pipeline": 4, "virtual_pipeline": 1}
    few = run_of_pairs(10, layout, 4)
    chunks = replace(few, layout=few.layout.model_copy(update={"virtual_pipeline": 1}))
    assert step_rows(chunks).rows < 4
    interleaved = replace(few, layout=few.layout.model_copy(update={"virtual_pipeline": 2}))
    assert step_rows(interleaved).rows == 4


def test_padding_takes_time_but_no_attention_and_no_head():
    run = small_run(row_tokens=4096, rows=1)
    padded = replace(run, used_share=0.5)
    full, half = row_time(run, 0, H100), row_time(padded, 0, H100)
    assert half.products == full.products
    assert half.heads == pytest.approx(full.heads / 2)
    assert half.attention == pytest.approx(full.attention / 2)


def test_a_live_reference_takes_a_forward_pass():
    large = {"hidden_size": 4096, "ffn_hidden_size": 16384, "row_tokens": 4096}
    run = small_run(lora=True, **large)
    forward, row = row_time(run, 0, H100, is_forward=True), row_time(run, 0, H100)
    # With frozen weights a forward pass is half of the products, with trained ones a third.
    assert row.products == pytest.approx(2 * forward.products, rel=0.01)
    trained = row_time(small_run(**large), 0, H100)
    assert trained.products == pytest.approx(3 * forward.products, rel=0.01)
    cached, live = step_time(run, H100), step_time(replace(run, reference="adapter_off"), H100)
    assert (cached.reference, live.reference) == (0.0, live.forward)
    offloaded = step_time(replace(run, reference="offloaded"), H100)
    assert offloaded.reference > live.reference


def test_experts_are_updated_by_the_ranks_that_hold_them():
    sizes = {"num_experts": 8, "experts_per_token": 2, "ffn_hidden_size": 1 << 16}
    spread = step_time(small_run({"expert": 8}, world_size=8, **sizes), H100)
    sharded = step_time(small_run({"expert": 1}, world_size=8, **sizes), H100)
    # 1/8 of the experts updated by one rank, or all of them by 8 ranks.
    assert spread.update == pytest.approx(sharded.update, rel=0.01)


def test_a_few_tokens_for_an_expert_take_as_long_as_reading_it():
    sizes = {"num_experts": 64, "experts_per_token": 1, "ffn_hidden_size": 4096}
    few = row_time(small_run(row_tokens=64, **sizes), 0, H100).products
    more = row_time(small_run(row_tokens=128, **sizes), 0, H100).products
    assert more < 1.2 * few


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_devices_are_known_by_whole_words(name, device):
    assert device_of(name) is (DEVICES[device] if device else None)


def test_sources_are_named():
    assert all(re.search("data sheet", device.source) for device in DEVICES.values())
