"""Numbers of things, in words."""

import pytest

from megatron_idpo.evaluate.counting import counted


@pytest.mark.parametrize(
    ("number", "message"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")]
)
def test_one_is_singular(number: int, message: str) -> None:
    assert counted(number, "row") == message
