"""The table as a reference: each row gets the numbers of its own pairs, by layer."""

import numpy as np
import torch

from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.tokenize.pair import Pair
from megatron_idpo.reference.cache import CachedLogps
from megatron_idpo.reference.cached import Cached

from .tiny_cache import logps


def row(*indices: int) -> Row:
    """A row of these pairs."""
    tokens = np.arange(2)
    return Row.build([Pair(index, tokens, tokens, tokens) for index in indices], 32, 0)


def test_every_row_gets_its_own_pairs() -> None:
    rows = (row(7, 2, 9), row(), row(0))
    batch = Batch(rows=rows, num_pairs=4, consumed_pairs=4, used_tokens=0, computed_tokens=0)
    found = Cached(CachedLogps((2, 4), logps())).logps(batch)
    assert len(found) == 3
    for one, by_layer in zip(rows, found, strict=True):
        assert list(by_layer) == [2, 4]
        for at, layer in enumerate((2, 4)):
            expected = logps()[one.pair_index_P, at].ravel()  # chosen, rejected, chosen, ...
            assert by_layer[layer].dtype == torch.float32
            np.testing.assert_array_equal(by_layer[layer].numpy(), expected)


def test_it_costs_no_forward_pass_and_is_a_reference() -> None:
    assert not Cached.is_live and not Cached.is_free
