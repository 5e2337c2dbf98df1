"""The longest common prefix, of anything."""

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.data.tokenize.common_prefix import common_length


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=3))
def test_it_is_the_common_prefix(texts: list[str]) -> None:
    raise_on_all_ranks = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    expected = len(list(raise_on_all_ranks))
    assert common_length(*texts) == expected
    assert common_length(*map(list, texts)) == expected
