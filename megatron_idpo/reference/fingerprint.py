"""The inputs that reference log-probabilities depend on, separately, so that a mismatch is named.

Left out, because log-probabilities depend on them only by rounding: the parallel layout, the
batches, how pairs are packed into rows, prompt sharing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.storage.provenance import diff

FORMAT = 4
"""Version of the cache: incremented when its files, or the values for the same inputs, change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The inputs of one cache; hashes are sha256 in hexadecimal digits."""

    weights: str
    """Of the model's weights and configuration."""

    tokenizer: str
    """Of the tokenizer without its chat template."""

    chat_template: str

    data: str
    """Of the tokens of all pairs, in order."""

    pairs: int
    """Their number."""

    max_length: int | None
    truncation: str

    layers: tuple[int, ...]
    """Ascending; the last is the final layer."""

    norm: str
    """Whether intermediate layers are read through the final norm: `final` or `none`."""

    dtype: str
    """The data type of weights and computation."""

    format: int = FORMAT

    def mismatch(self, required: "Fingerprint") -> str | None:
        """Why a run that requires `required` cannot use this cache; None if it can.

        The cache may have more layers than required, and `norm` does not matter if only the final
        layer is required.
        """
        comparable = {**required.as_dict(), "layers": self.layers}
        if len(required.layers) == 1:
            comparable["norm"] = self.norm
        differences = diff(self.as_dict(), comparable, _LABELS)
        missing = sorted(set(required.layers) - set(self.layers))
        reasons = []
        if differences:
            reasons.append(f"was made from other inputs: {'; '.join(map(str, differences))}")
        if missing:
            layers = ", ".join(map(str, missing))
            reasons.append(f"lacks layer{'s' if len(missing) > 1 else ''} {layers}")
        return "; ".join(reasons) or None

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


_LABELS = {
    "format": "the format",
    "weights": "the model (weights or config.json)",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "data": "the data (some token of some pair, or their order)",
    "pairs": "the number of pairs",
    "max_length": "data.max_length",
    "truncation": "data.truncation",
    "norm": "objective.norm",
    "dtype": "model.dtype",
}
"""The names of the inputs in messages."""


def fingerprint(
    config: RunConfig, pairs: PairDataset, tokenizer: Tokenizer, *, weights: str, num_layers: int
) -> Fingerprint:
    """The fingerprint of the cache that a run requires.

    Args:
        config: of the run.
        pairs: the pairs to be scored.
        tokenizer: of the pairs.
        weights: the identity of the reference.
        num_layers: of the model.

    Raises:
        ConfigError: the model does not have one of the layers.
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
