"""Targets and micro-batches: sums over sequences, and validation."""

from dataclasses import replace

import pytest
import torch

from megatron_idpo.errors import DataError
from megatron_idpo.plugin.micro_batch import MicroBatch, Targets


def targets(sequences: list[int], num_pairs: int) -> Targets:
    count = torch.arange(len(sequences))
    return Targets(count, count + 1, torch.tensor(sequences, dtype=torch.int64), num_pairs)


def micro_batch(**fields: object) -> MicroBatch:
    fields_of_row = {
        "position_ids_T": torch.tensor([0, 1, 2, 3, 4, 2, 3, 4]),
        "spans_G4": torch.tensor([[0, 2, 5, 8]], dtype=torch.int32),
        "targets": targets([0, 0, 0, 1, 1], 1),
    }
    return MicroBatch(**{**fields_of_row, **fields})


def test_sums_and_lengths_of_sequences_in_any_order():
    mixed = targets([1, 0, 3, 2, 1, 3, 3], 2)
    values_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], requires_grad=True)
    sums_2P = mixed.sum_by_sequence(values_N)
    assert sums_2P.tolist() == [2.0, 17.0, 8.0, 100.0]
    sums_2P[1].backward()
    assert values_N.grad.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert mixed.lengths().tolist() == [1.0, 2.0, 1.0, 3.0]
    assert mixed.lengths().dtype == torch.float32


def test_empty_row_is_connected_to_the_graph():
    empty = targets([], 0)
    values_N = torch.zeros(0, requires_grad=True)
    sums_2P = empty.sum_by_sequence(values_N)
    assert sums_2P.shape == (0,) and sums_2P.requires_grad
    sums_2P.sum().backward()
    assert values_N.grad.shape == (0,)
    micro_batch(targets=empty, spans_G4=torch.zeros(0, 4, dtype=torch.int32))


def test_micro_batch_is_a_valid_packed_seq_params():
    packed = micro_batch()
    assert packed.qkv_format == "sbhd" and packed.max_seqlen_q == packed.row_tokens == 8
    assert packed.reference_logps == {} and not packed.reference_free
    assert packed.num_micro_batches == packed.global_pairs == 0, "required in training"


def test_all_problems_are_reported_with_the_micro_batch_index():
    row = micro_batch(index=7)
    wrong = {2: torch.zeros(3), 4: torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(DataError) as caught:
        micro_batch(
            index=7,
            targets=replace(row.targets, positions_N=row.targets.positions_N + 8),
            reference_logps=wrong,
        )
    message = str(caught.value)
    assert message.startswith("3 problems") and message.count("micro-batch 7") == 3
    assert "has values from 8 to 12" in message and "[2] has shape (3,)" in message
    assert "[4] is torch.float16" in message


def invalid_targets() -> dict[str, tuple[Targets, str]]:
    valid = targets([0, 0, 0, 1, 1], 1)
    return {
        "position too large": (
            replace(valid, positions_N=valid.positions_N + 4),
            "from 4 to 8, but there are 8",
        ),
        "negative position": (
            replace(valid, positions_N=valid.positions_N - 1),
            "positions_N has values from -1",
        ),
        "unknown sequence": (targets([0, 0, 0, 1, 2], 1), "from 0 to 2, but there are 2 sequences"),
        "sequence without target": (targets([0, 0, 0, 0, 0], 1), "a sequence has no target"),
        "unequal lengths": (replace(valid, tokens_N=valid.tokens_N[1:]), "not one [N]"),
        "two dimensions": (replace(valid, tokens_N=valid.tokens_N[None]), "not one [N]"),
        "not integers": (replace(valid, tokens_N=valid.tokens_N.float()), "not all int64"),
        "no pairs counted": (replace(valid, num_pairs=0), "5 targets for 0 pairs"),
        "no targets": (targets([], 1), "0 targets for 1 pairs"),
    }


@pytest.mark.parametrize("name", invalid_targets())
def test_invalid_targets_are_reported(name):
    invalid, message = invalid_targets()[name]
    with pytest.raises(DataError) as caught:
        micro_batch(targets=invalid)
    assert message in str(caught.value) and "build it from one row" in str(caught.value)


def test_reference_free_excludes_reference_log_probabilities():
    with pytest.raises(DataError, match="has reference_logps although it is reference_free"):
        micro_batch(reference_free=True, reference_logps={4: torch.zeros(2)})


def test_values_on_a_gpu_are_not_read():
    """Reading would synchronize; `meta` tensors have no values at all."""
    row = micro_batch().targets
    on_meta = [tensor.to("meta") for tensor in (row.positions_N, row.tokens_N, row.sequences_N)]
    assert Targets(*on_meta, num_pairs=1).validate(row_tokens=1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_log_probabilities_may_be_float32_or_float64(dtype):
    assert micro_batch(reference_logps={4: torch.zeros(2, dtype=dtype)}).reference_logps
