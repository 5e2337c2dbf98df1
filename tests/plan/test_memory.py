"""Memory of small runs, calculated by hand."""

from dataclasses import replace

import pytest

from megatron_idpo.plan import activations
from megatron_idpo.plan.devices import DEVICES, find_device
from megatron_idpo.plan.memory import StageMemory, stage_memory
from megatron_idpo.plan.run_sizes import RunSizes

from .small_run import small_run

H100 = DEVICES["h100"]


def memory(run: RunSizes, stage: int = 0) -> StageMemory:
    return stage_memory(run, stage, H100)


# The model of small_run: 4 layers of hidden 8, 2 query heads and 1 key head of 4, MLP of 16, 10
# tokens. A layer has q 64 + k 32 + v 32 + o 64 + MLP 384 + norms 16 = 592 weights.


def test_weights_gradients_and_optimizer_of_one_gpu():
    found = memory(small_run())
    weights = 4 * 592 + 2 * 80 + 8
    assert found.weights == 2 * weights
    assert found.gradients == 4 * weights
    assert found.optimizer == 12 * weights
    assert found.adapters == found.head_copies == found.reference == 0


def test_fp32_weights_have_no_main_copies():
    found = memory(small_run(dtype="fp32"))
    assert (found.weights, found.optimizer) == (4 * 2536, 8 * 2536)


def test_stages_share_layers_and_data_parallel_ranks_the_optimizer():
    run = small_run({"pipeline": 2}, world_size=8)
    first, last = memory(run, 0), memory(run, 1)
    assert first.weights == 2 * (2 * 592 + 80)
    assert last.weights == 2 * (2 * 592 + 80 + 8)
    assert first.optimizer == 12 * (2 * 592 + 80) / 4


def test_tensor_parallel_ranks_split_matrices_not_norms():
    run = small_run({"tensor": 2}, world_size=2, num_kv_heads=2)
    # q 64 + k 64 + v 64 + o 64 + MLP 384, halved, and norms.
    assert memory(run).weights == 2 * (4 * (320 + 16) + 2 * 40 + 8)


def test_tied_embeddings_are_one_matrix_on_one_stage_and_a_copy_on_two():
    assert memory(small_run(tied_embeddings=True)).weights == 2 * (4 * 592 + 80 + 8)
    run = small_run({"pipeline": 2}, world_size=2, tied_embeddings=True)
    assert memory(run, 1).weights == 2 * (2 * 592 + 80 + 8)


def test_adapters_train_alone():
    found = memory(small_run(lora=True))
    # Rank 2: inputs and outputs of q, k, v, o, gate, up, down.
    adapters = 4 * 2 * (16 + 12 + 12 + 16 + 24 + 24 + 24)
    assert found.adapters == 2 * adapters
    assert (found.gradients, found.optimizer) == (4 * adapters, 12 * adapters)


def test_a_tap_on_a_stage_without_the_head_holds_a_copy_of_it():
    run = small_run({"pipeline": 2}, world_size=2, taps=(1, 2))
    assert memory(run, 0).head_copies == 2 * 88
    assert memory(run, 1).head_copies == 0
    assert memory(run, 0).gradients == 4 * (2 * 592 + 80 + 88)
    # The first stage of a tied model has the matrix, and copies the norm only.
    assert memory(replace(run, model=replace(run.model, tied_embeddings=True)), 0).head_copies == 16


def test_frozen_copies_of_two_chunks_share_their_memory():
    layout = {"pipeline": 2, "virtual_pipeline": 2}
    frozen = small_run(layout, world_size=2, taps=(1, 3), lora=True)
    trained = small_run(layout, world_size=2, taps=(1, 3))
    assert memory(frozen).head_copies == 2 * 88
    assert memory(trained).head_copies == 2 * 2 * 88


def test_experts_are_split_and_sharded_over_their_own_ranks():
    run = small_run({"expert": 2}, world_size=4, num_experts=4, experts_per_token=2)
    dense = 4 * (592 - 384 + 4 * 8) + 2 * 80 + 8
    experts = 4 * 2 * 384
    found = memory(run)
    assert found.weights == 2 * (dense + experts)
    assert found.optimizer == 12 * (dense / 4 + experts / 2)


def test_a_layer_keeps_what_its_formula_says():
    run = small_run(row_tokens=100)
    # Norms 4·8; q, k, v 16; rotated 12; attention 8; cos and sin 16; MLP 48; two bytes each.
    elements = 100 * (32 + 16 + 12 + 8 + 16 + 48)
    statistics = 100 * (2 + 2)
    assert activations.layer_bytes(run) == 2 * elements + 4 * statistics


def test_inputs_of_linears_without_adapters_are_not_kept():
    run = small_run(row_tokens=100, lora=True)
    assert run.lora is not None
    only_v = replace(run, lora=run.lora.model_copy(update={"targets": ("v_proj",)}))
    # The second norm's output and the last linear's input, and the low-rank products.
    fewer = 100 * (8 + 16 + 6 * 2)
    assert activations.layer_bytes(run) - activations.layer_bytes(only_v) == 2 * fewer


def test_a_cpu_keeps_dropout_masks_of_layers_that_are_not_recomputed():
    run = small_run(row_tokens=100, lora=True)
    assert run.lora is not None
    run = replace(run, lora=run.lora.model_copy(update={"dropout": 0.1}))
    # A byte per position and input: q, k, v, gate, up 5·8; o 8; down 16.
    layer = 100 * (5 * 8 + 8 + 16)
    assert activations.dropout_mask_bytes(run, 0) == 4 * layer
    three = replace(run, recompute="full", recompute_layers=3)
    assert activations.dropout_mask_bytes(three, 0) == 2 * layer  # one of them at a time
    without = replace(run, lora=run.lora.model_copy(update={"dropout": 0.0}))
    cpu = find_device("cpu", 1)
    for device, masks in ((cpu, 4 * layer), (H100, 0)):
        kept = [stage_memory(each, 0, device).activations for each in (run, without)]
        assert kept[0] - kept[1] == masks


@pytest.mark.parametrize(
    ("layout", "rows", "counts"),
    [
        ({"pipeline": 4}, 8, [[4], [3], [2], [1]]),
        ({"pipeline": 4}, 2, [[2], [2], [2], [1]]),
        # 2·(PP − 1 − stage) + PP + 1 units: 4 of the first chunk, then of the second.
        ({"pipeline": 2, "virtual_pipeline": 2}, 8, [[3, 2], [2, 1]]),
    ],
)
def test_rows_in_flight(layout, rows, counts):
    run = small_run(layout, world_size=layout["pipeline"], rows=rows)
    found = [activations.rows_in_flight(run, stage) for stage in range(layout["pipeline"])]
    assert found == counts


def test_memory_is_that_of_a_step_of_longest_pairs():
    run = small_run({"pipeline": 4}, world_size=4, rows=8)
    short = replace(run, assumed=replace(run.assumed, pair_tokens=8))
    assert activations.rows_in_flight(short, 0) == [4]
    # Where no pair is longer than a quarter of a row, eight fill two rows.
    assert activations.rows_in_flight(replace(short, longest_pair_tokens=16), 0) == [2]


def test_recomputed_layers_keep_their_input_only():
    run = small_run(row_tokens=4096)
    full = replace(run, recompute="full")
    difference = memory(run).activations - memory(full).activations
    assert difference == 4 * (activations.layer_bytes(run) - 4096 * 8 * 2)
    assert memory(replace(full, recompute_layers=4)).step == memory(full).step


def test_selective_recomputation_keeps_as_much():
    run = small_run(row_tokens=4096)
    assert memory(replace(run, recompute="selective")).step == memory(run).step


def test_the_update_counts_where_it_is_larger_than_activations():
    found = memory(small_run(row_tokens=8))
    assert found.step == max(found.activations + found.temporaries, 4 * 2536)


def test_copies_of_the_reference():
    run = small_run()
    assert memory(replace(run, reference="resident")).reference == 2 * 2536
    offloaded = memory(replace(run, reference="offloaded"))
    assert offloaded.reference == 0
    # And a layer or a head of its forward pass.
    assert offloaded.reference_pass > 2 * 2536


def test_the_total_has_every_component_and_the_margins():
    found = memory(small_run({"pipeline": 2}, world_size=4))
    # Pipeline, gradients, gradient norm, world.
    margins = H100.context_bytes + 4 * H100.nccl_bytes + H100.cublas_bytes
    expected = (found.held + found.step) * 1.05 + margins
    assert found.total == pytest.approx(expected)


def test_a_frozen_copy_next_to_the_head_shares_its_memory():
    layout = {"pipeline": 2, "virtual_pipeline": 2}
    assert memory(small_run(layout, world_size=2, taps=(2,), lora=True), 1).head_copies == 0
    assert memory(small_run(layout, world_size=2, taps=(2,)), 1).head_copies == 2 * 88
