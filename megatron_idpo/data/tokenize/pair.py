"""One tokenised preference pair, and what a collection of them must offer.

This is the border between tokenising (`chat.py`, `preferences.py`) and packing (`rows.py`,
`packing.py`, `batches.py`). Planning reads only lengths; tokens are fetched once, when the row that
holds the pair is built. Nothing here truncates, validates text or knows a tokenizer.

Shapes: P pairs in the collection; 3 = prompt, chosen, rejected.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]
"""A numpy array of any integer type."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A prompt with the preferred and the other answer, as token ids.

    The prompt has at least one token (a BOS if nothing else): the first token of an answer is
    predicted from the prompt's last position. EOS or end-of-turn belongs to the answers.
    """

    index: int
    """Which pair of its collection this is; the key of its reference log-probabilities."""

    prompt_tokens: NDArray[np.int32]
    chosen_tokens: NDArray[np.int32]
    rejected_tokens: NDArray[np.int32]


class PairSource(Protocol):
    """A random-access collection of tokenised pairs."""

    @property
    def lengths_P3(self) -> IntArray:
        """int [P, 3]: tokens in prompt, chosen and rejected of every pair; may be memory-mapped."""

    def __len__(self) -> int:
        """The number of pairs P."""

    def __getitem__(self, index: int, /) -> Pair:
        """The pair at `index`, 0 <= index < P."""
