"""How far sequences agree from their start: characters, messages or tokens."""

from collections.abc import Sequence
from typing import Any


def common_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """The length of the longest common prefix of all sequences.

    Whole prefixes are compared first, which is what most callers' data turn out to be.
    """
    length = min(map(len, (first, *others)))
    for other in others:
        if first[:length] != other[:length]:
            length = next(at for at in range(length) if first[at] != other[at])
    return length
