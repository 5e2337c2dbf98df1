"""What reference log-probabilities depend on, part by part, so that a mismatch can be named.

Not among the parts, because log-probabilities do not depend on them beyond rounding: the parallel
layout, the batches, how pairs are packed into rows, prompt sharing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.objective.layers import resolve_layers

FORMAT = 3
"""Of the cache: raised when its files change, or what is computed for the same model and data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """One cache's; hashes are sha256 in hexadecimal digits."""

    weights: str
    """Of the model's weights and configuration."""

    tokenizer: str
    """Of the tokenizer without its chat template."""

    chat_template: str

    data: str
    """Of the tokens of all pairs, in order."""

    pairs: int
    """How many they are."""

    max_length: int | None
    truncation: str

    layers: tuple[int, ...]
    """Ascending; the last is the final layer."""

    norm: str
    """Whether intermediate layers are read through the final norm: `final` or `none`."""

    dtype: str
    """What weights are held and computed in."""

    format: int = FORMAT

    def differences(self, wanted: "Fingerprint") -> list[str]:
        """In what this one, of a cache, is not what a run wants; a sentence for each part.

        More layers than wanted are no difference, and how intermediate layers are read is none
        where none is wanted.
        """
        found = []
        for name, message in _TOLD.items():
            mine, other = getattr(self, name), getattr(wanted, name)
            if name == "norm" and len(wanted.layers) == 1:
                continue
            if name == "layers":
                lacking = sorted(set(other) - set(mine))
                if lacking:
                    found.append(f"it lacks layers {', '.join(map(str, lacking))}")
            elif mine != other and isinstance(mine, str) and len(mine) == _DIGITS:
                found.append(f"{message} differs")
            elif mine != other:
                found.append(f"{message} is {mine}, here {other}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON.

        Raises:
            ValueError: a part is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"parts {sorted(set(values) ^ names)}")
        return cls(**{**values, "layers": tuple(values["layers"])})


_DIGITS = 64

_TOLD = {
    "format": "the format",
    "weights": "the model (weights or config.json)",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "data": "the data (some token of some pair, or their order)",
    "pairs": "the number of pairs",
    "max_length": "data.max_length",
    "truncation": "data.truncation",
    "layers": "objective.layers",
    "norm": "objective.norm",
    "dtype": "model.dtype",
}
"""Every part in a user's words."""


def fingerprint(
    config: RunConfig, pairs: PairDataset, tokenizer: Tokenizer, *, weights: str, num_layers: int
) -> Fingerprint:
    """What a run needs of a cache.

    Args:
        config: of the run.
        pairs: to be scored.
        tokenizer: that made them.
        weights: the identity of the reference.
        num_layers: of the model.

    Raises:
        ConfigError: layers that the model has not.
    """
    data = config.data
    return Fingerprint(
        weights=weights,
        tokenizer=tokenizer.vocabulary_identity,
        chat_template=tokenizer.template_identity,
        data=pairs.fingerprint,
        pairs=len(pairs),
        max_length=data.max_length,
        truncation=data.truncation,
        layers=(*sorted(resolve_layers(config.objective.layers, num_layers)), num_layers),
        norm=config.objective.norm,
        dtype=config.model.dtype,
    )
