"""Statistics: computed by hand, or compared with the rows that training builds."""

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_idpo.data.inspect import statistics
from megatron_idpo.data.inspect.statistics import (
    Quantiles,
    length_quantiles,
    plan_sampled_steps,
    sampled_steps,
    sharing_gain,
)
from megatron_idpo.data.packing.batches import RowSettings, TrainingBatches
from megatron_idpo.data.pairs import Pair
from megatron_idpo.errors import DataError


class PlainPairs:
    """Pairs of the given lengths, all of one token."""

    def __init__(self, lengths_P3: NDArray[np.int32]) -> None:
        self.lengths_P3 = lengths_P3
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.lengths_P3)

    def __getitem__(self, index: int) -> Pair:
        self.fetched += 1
        return Pair(index, *(np.ones(length, np.int32) for length in self.lengths_P3[index]))


def random_pairs(num_pairs: int, longest: int = 60) -> PlainPairs:
    random = np.random.default_rng(3)
    return PlainPairs(random.integers(1, longest + 1, (num_pairs, 3), dtype=np.int32))


def test_quantiles_are_values_that_occur() -> None:
    assert Quantiles.of(np.array([5, 1, 9, 3])) == Quantiles(1, 3, 9, 9)
    assert Quantiles.of(np.arange(1, 101)) == Quantiles(1, 50, 90, 100)
    assert Quantiles.of(np.array([7])) == Quantiles(7, 7, 7, 7)


def test_lengths_and_sharing_gain() -> None:
    lengths_P3 = np.array([[10, 1, 2], [20, 3, 4], [30, 50, 60]], np.int32)
    assert length_quantiles(lengths_P3, share_prompt=True) == {
        "prompt": Quantiles(10, 20, 30, 30),
        "chosen": Quantiles(1, 3, 50, 50),
        "rejected": Quantiles(2, 4, 60, 60),
        "pair": Quantiles(13, 27, 140, 140),
    }
    separate = length_quantiles(lengths_P3, share_prompt=False)
    assert separate["pair"] == Quantiles(23, 47, 170, 170)
    assert sharing_gain(lengths_P3) == (2 * 60 + 120) / (60 + 120)


@pytest.mark.parametrize(
    "options", [{}, {"share_prompt": False, "trim_tokens": 0}, {"data_size": 3, "rows_multiple": 2}]
)
def test_rows_equal_those_of_training(options: dict[str, int]) -> None:
    """Over all steps and all ranks, without reading tokens."""
    pairs, run = random_pairs(50), {"global_batch_pairs": 8, "seed": 5, "epochs": 2}
    settings = {"row_tokens": 512, "pad_token": 0, "trim_tokens": 32, **options}
    rows = plan_sampled_steps(pairs, RowSettings(**settings), **run)
    assert pairs.fetched == 0
    assert (rows.steps, rows.dropped_pairs) == (12, 4)
    ranks = [
        list(TrainingBatches(pairs, RowSettings(**settings, data_rank=rank), **run))
        if "data_size" in options
        else list(TrainingBatches(pairs, RowSettings(**settings), **run))
        for rank in range(options.get("data_size", 1))
    ]
    assert rows.rows_S.tolist() == [len(batch.rows) for batch in ranks[0]]
    assert rows.length_S.tolist() == [batch.row_tokens for batch in ranks[0]]
    built = [row for step in zip(*ranks, strict=True) for batch in step for row in batch.rows]
    assert rows.pairs_R.tolist() == [row.num_pairs for row in built]
    assert rows.used_R.tolist() == [row.used_tokens for row in built]
    assert rows.fill_R.tolist() == [row.used_tokens / len(row.tokens_T) for row in built]
    used, computed = (
        sum(getattr(batch, name) for batch in ranks[0])
        for name in ("used_tokens", "computed_tokens")
    )
    assert rows.fill == used / computed


def test_long_run_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(sampled_steps(3, 10)) == [0, 1, 2]
    steps = list(sampled_steps(1000, 10))
    assert steps == list(range(0, 1000, 5))
    assert len(list(sampled_steps(10**6, 2**15))) == 4
    assert list(sampled_steps(10**6, 10**9)) == [0]
    monkeypatch.setattr(statistics, "MAX_SAMPLED_STEPS", 2)
    settings = RowSettings(row_tokens=512, pad_token=0)
    run = {"global_batch_pairs": 5, "seed": 0, "epochs": 1}
    rows = plan_sampled_steps(random_pairs(50), settings, **run)
    assert (rows.steps, len(rows.rows_S), int(rows.pairs_R.sum())) == (10, 2, 10)


def test_untrainable_data_is_refused() -> None:
    run = {"global_batch_pairs": 5, "seed": 0, "epochs": 1}
    with pytest.raises(DataError, match=r"data\.row_tokens"):
        plan_sampled_steps(random_pairs(50), RowSettings(row_tokens=64, pad_token=0), **run)
    with pytest.raises(DataError, match=r"training\.global_batch_pairs"):
        plan_sampled_steps(random_pairs(3), RowSettings(row_tokens=512, pad_token=0), **run)
