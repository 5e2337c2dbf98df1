"""A model that does not change: what training starts from, what its policy is compared to."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_idpo.convert.model_source import (
    ModelSource,
    files_fingerprint,
    weights_fingerprint,
)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """Weights, it may be with an adapter on them, and what tells them from all others.

    Two are the same where their identities are, wherever their files lie.
    """

    source: ModelSource
    base_identity: str
    """Of the weights without the adapter: a hash that is the same in every layout."""

    adapter: Path | None = None
    """A PEFT directory."""

    adapter_identity: str = ""
    """Likewise of the adapter."""

    @classmethod
    def of(cls, source: ModelSource) -> Self:
        """A model as its files are; every byte is read. Collective."""
        return cls(source, weights_fingerprint(source))

    def with_adapter(self, adapter: Path) -> "FrozenModel":
        """The same weights with a PEFT adapter, every byte of which is read. Collective."""
        files = [path for name in _ADAPTER_FILES if (path := adapter / name).is_file()]
        return FrozenModel(self.source, self.base_identity, adapter, files_fingerprint(files))

    @property
    def identity(self) -> str:
        """sha256 of the whole."""
        if self.adapter is None:
            return self.base_identity
        return hashlib.sha256(f"{self.base_identity} {self.adapter_identity}".encode()).hexdigest()
