"""A pair is an immutable value that any collection can hand out."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from megatron_idpo.data.packing.batches import EvaluationBatches, RowSettings
from megatron_idpo.data.tokenize.pair import Pair, PairSource

PAIRS = [
    Pair(index, *(np.full(length, index, np.int32) for length in (3, 2, 1))) for index in range(4)
]


class Collection:
    """The least that is a `PairSource`: no base class, nothing but lengths and access."""

    lengths_P3 = np.array([[3, 2, 1]] * len(PAIRS))

    def __len__(self) -> int:
        return len(PAIRS)

    def __getitem__(self, index: int, /) -> Pair:
        return PAIRS[index]


def test_a_pair_cannot_be_changed_or_extended() -> None:
    with pytest.raises(FrozenInstanceError):
        PAIRS[0].index = 1  # type: ignore[misc]
    assert not hasattr(PAIRS[0], "__dict__")


def test_pairs_are_told_apart_by_identity() -> None:
    # Comparing arrays would be ambiguous, and a pair has to be a key.
    alike = Pair(0, *(np.zeros(length, np.int32) for length in (3, 2, 1)))
    assert PAIRS[0] == PAIRS[0] and PAIRS[0] != alike
    assert len({*PAIRS, alike}) == len(PAIRS) + 1


def test_lengths_and_access_are_all_that_training_asks_of_a_collection() -> None:
    source: PairSource = Collection()
    settings = RowSettings(row_tokens=6, pad_token=9)
    batches = EvaluationBatches(source, settings, global_batch_pairs=len(PAIRS))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(row.tokens_T.tolist() for row in rows) == [[index] * 6 for index in range(4)]
    assert sorted(int(row.pair_index_P[0]) for row in rows) == [0, 1, 2, 3]
