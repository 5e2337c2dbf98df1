"""What answers prompts: one protocol, and which library stands behind it.

`engine_transformers.py` runs anywhere, `engine_vllm.py` on a GPU where vLLM is installed. Both get
tokens and give tokens; what is text, and where an answer ends, is decided once, in `generate.py`.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_idpo.errors import ConfigError

type EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the fields of the configuration's section `generate`."""

    temperature: float
    repetition_penalty: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Weights:
    """A model on the disk, and how it is to be held."""

    directory: Path
    adapter: Path | None
    dtype: Literal["bf16", "fp16", "fp32"]


class Engine(Protocol):
    """A loaded model, which whoever made it closes (`contextlib.closing`)."""

    def answer(self, first: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Answer one batch.

        Args:
            first: index of the first prompt; with the seed it decides what is drawn.
            prompts: tokens of each prompt.

        Returns:
            The new tokens of each answer, with the one that ended it and maybe more behind it.
        """

    def close(self) -> None:
        """Let go of the model; its memory is free afterwards, and nothing can be answered."""


def choose_engine(wanted: Literal["auto", "transformers", "vllm"]) -> EngineName:
    """Which library answers on this machine.

    Raises:
        ConfigError: vLLM is wanted and not installed.
    """
    if wanted == "transformers":
        return wanted
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm":
        if not has_vllm:
            remedy = "install it (pip install vllm), or set it to auto or transformers"
            raise ConfigError.at("generate.engine", "is vllm, which is not installed", remedy)
        return wanted
    import torch

    return "vllm" if has_vllm and torch.cuda.is_available() else "transformers"


def batches_at_once(engine: EngineName) -> int:
    """How many of the configured batches an engine is given in one call, and are saved together.

    vLLM forms batches by itself, and is idle while it is given few prompts.
    """
    return 32 if engine == "vllm" else 1


def derived_seed(seed: int, index: int) -> int:
    """A seed for one batch or one prompt, 0 <= seed < 2^31, unlike those of its neighbours."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


def versions(engine: EngineName, *, has_adapter: bool) -> dict[str, str]:
    """The libraries that have a say in which tokens come out."""
    names = ["torch", "transformers", *(["vllm"] if engine == "vllm" else [])]
    if has_adapter and engine == "transformers":
        names.append("peft")
    return {name: _version(name) for name in names}


def device_name() -> str:
    """The device that answers."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
