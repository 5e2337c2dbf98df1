"""`RowParams`: Megatron's fields, and the checks of its arrays."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_idpo.mcore.attention.row_params import RowParams


def test_fields_that_megatron_reads():
    spans = torch.tensor([[0, 2, 3, 5], [6, 9, 9, 9]], dtype=torch.int32)
    row = RowParams.of(torch.tensor([0, 1, 2, 2, 3, 0, 0, 1, 2, 0]), spans)
    assert isinstance(row, PackedSeqParams)
    assert row.qkv_format == "sbhd" and row.cu_seqlens_q is None
    assert row.max_seqlen_q == row.max_seqlen_kv == row.row_tokens == 10
    assert row.groups == ((0, 2, 3, 5), (6, 9, 9, 9))


def test_plain_row_is_one_causal_sequence():
    row = RowParams.plain(4)
    assert row.position_ids_T.tolist() == [0, 1, 2, 3]
    assert row.groups == ((0, 4, 4, 4),)


def test_positions_may_start_anywhere():
    spans = torch.tensor([[0, 2, 3, 4]], dtype=torch.int32)
    RowParams.of(torch.tensor([7, 8, 9, 9]), spans)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 2, 1, 3]], "do not ascend"),
        ([[0, 1, 2, 4], [3, 4, 5, 6]], "before 4"),
        ([[-1, 0, 1, 2]], "before 0"),
        ([[0, 3, 6, 9]], "row of 8"),
        ([[0, 8, 8]], r"not int32 \[G, 4\]"),
    ],
)
def test_inconsistent_spans_are_rejected(spans, message):
    with pytest.raises(AssertionError, match=message):
        RowParams.of(torch.zeros(8, dtype=torch.int64), torch.tensor(spans, dtype=torch.int32))


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 0, 1, 1, 2]])
def test_answers_must_continue_from_their_prompt(positions):
    spans = torch.tensor([[0, 2, 3, 5]], dtype=torch.int32)
    RowParams.of(torch.tensor([0, 1, 2, 2, 3]), spans)
    with pytest.raises(AssertionError, match="continue from its prompt"):
        RowParams.of(torch.tensor(positions), spans)
