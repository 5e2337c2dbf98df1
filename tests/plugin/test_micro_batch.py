"""What a micro-batch's targets add up to; what cannot be a row's is in `test_wrong_use.py`."""

from dataclasses import replace

import pytest
import torch

from megatron_idpo.errors import DataError
from megatron_idpo.plugin.micro_batch import MicroBatch, Targets


def targets(sequences: list[int], num_pairs: int) -> Targets:
    count = torch.arange(len(sequences))
    return Targets(count, count + 1, torch.tensor(sequences, dtype=torch.int64), num_pairs)


def micro_batch(**fields: object) -> MicroBatch:
    given = {
        "position_ids_T": torch.tensor([0, 1, 2, 3, 4, 2, 3, 4]),
        "spans_G4": torch.tensor([[0, 2, 5, 8]], dtype=torch.int32),
        "targets": targets([0, 0, 0, 1, 1], 1),
    }
    return MicroBatch(**{**given, **fields})


def test_sums_and_lengths_of_sequences_in_any_order():
    mixed = targets([1, 0, 3, 2, 1, 3, 3], 2)
    values_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], requires_grad=True)
    sums_2P = mixed.sum_by_sequence(values_N)
    assert sums_2P.tolist() == [2.0, 17.0, 8.0, 100.0]
    sums_2P[1].backward()
    assert values_N.grad.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert mixed.lengths().tolist() == [1.0, 2.0, 1.0, 3.0]
    assert mixed.lengths().dtype == torch.float32


def test_a_row_without_pairs_still_has_a_gradient():
    empty = targets([], 0)
    values_N = torch.zeros(0, requires_grad=True)
    sums_2P = empty.sum_by_sequence(values_N)
    assert sums_2P.shape == (0,) and sums_2P.requires_grad
    sums_2P.sum().backward()
    assert values_N.grad.shape == (0,)
    micro_batch(targets=empty, spans_G4=torch.zeros(0, 4, dtype=torch.int32))


def test_it_is_what_megatron_core_takes_for_packed_sequences():
    packed = micro_batch()
    assert packed.qkv_format == "sbhd" and packed.max_seqlen_q == packed.row_tokens == 8
    assert packed.reference_logps == {} and not packed.reference_free
    assert packed.num_micro_batches == packed.global_pairs == 0, "training has to say them"


def test_mistakes_are_told_together_with_the_micro_batch():
    one = micro_batch(index=7).targets
    wrong = {2: torch.zeros(3), 4: torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(DataError) as caught:
        micro_batch(
            index=7, targets=replace(one, positions_N=one.positions_N + 8), reference_logps=wrong
        )
    message = str(caught.value)
    assert message.startswith("3 problems") and message.count("micro-batch 7") == 3
    assert "reaches from 8 to 12" in message and "[2] has shape (3,)" in message
    assert "[4] is torch.float16" in message


def mistakes_of_targets() -> dict[str, tuple[Targets, str]]:
    one = targets([0, 0, 0, 1, 1], 1)
    return {
        "far": (replace(one, positions_N=one.positions_N + 4), "from 4 to 8, but there are 8"),
        "before": (replace(one, positions_N=one.positions_N - 1), "positions_N reaches from -1"),
        "stranger": (targets([0, 0, 0, 1, 2], 1), "from 0 to 2, but there are 2 sequences"),
        "silent": (targets([0, 0, 0, 0, 0], 1), "a sequence has no target"),
        "ragged": (replace(one, tokens_N=one.tokens_N[1:]), "not one [N]"),
        "flat": (replace(one, tokens_N=one.tokens_N[None]), "not one [N]"),
        "floating": (replace(one, tokens_N=one.tokens_N.float()), "not all int64"),
        "uncounted": (replace(one, num_pairs=0), "5 targets for 0 pairs"),
        "nothing": (targets([], 1), "0 targets for 1 pairs"),
    }


@pytest.mark.parametrize("name", mistakes_of_targets())
def test_targets_that_are_no_rows(name):
    wrong, message = mistakes_of_targets()[name]
    with pytest.raises(DataError) as caught:
        micro_batch(targets=wrong)
    assert message in str(caught.value) and "build it from one row" in str(caught.value)


def test_a_reference_is_there_or_it_is_not():
    with pytest.raises(DataError, match="is reference_free and brings reference_logps"):
        micro_batch(reference_free=True, reference_logps={4: torch.zeros(2)})


def test_values_on_a_gpu_are_not_looked_at():
    """A look would synchronise; `meta` has no values at all."""
    one = micro_batch().targets
    far = [tensor.to("meta") for tensor in (one.positions_N, one.tokens_N, one.sequences_N)]
    assert Targets(*far, num_pairs=1).mistakes(row_tokens=1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_references_of_full_precision_are_taken(dtype):
    assert micro_batch(reference_logps={4: torch.zeros(2, dtype=dtype)}).reference_logps
