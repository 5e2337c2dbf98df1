"""The interface of generation engines, and the choice of one.

`transformers_engine.py` runs anywhere; `vllm_engine.py` needs a GPU and vLLM. Engines receive and
return token ids. Tokenization, and where an answer ends, are decided once, in `task.py`.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Literal, Protocol

from megatron_idpo.errors import ConfigError

type EngineName = Literal["transformers", "vllm"]


class Engine(Protocol):
    """A loaded model; its creator closes it (`contextlib.closing`)."""

    def answer(self, first: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Generates the answers of one batch.

        Args:
            first: index of the first prompt; together with the seed it determines the samples.
            prompts: token ids of each prompt.

        Returns:
            New token ids per prompt: the stop token is included, and more tokens may follow it.
        """

    def close(self) -> None:
        """Frees the model's memory; the engine cannot be used afterwards."""


def choose_engine(requested: Literal["auto", "transformers", "vllm"]) -> EngineName:
    """The engine to use on this machine.

    Raises:
        ConfigError: vLLM is requested, but not installed.
    """
    if requested == "transformers":
        return requested
    has_vllm = importlib.util.find_spec("vllm") is not None
    if requested == "vllm":
        if not has_vllm:
            remedy = "install it (pip install vllm), or set it to auto or transformers"
            raise ConfigError.at("generate.engine", "is vllm, which is not installed", remedy)
        return requested
    import torch

    return "vllm" if has_vllm and torch.cuda.is_available() else "transformers"


def batches_per_call(engine: EngineName) -> int:
    """How many configured batches are passed to an engine, and saved, at once.

    vLLM schedules its batches itself, and needs many prompts to be busy.
    """
    return 32 if engine == "vllm" else 1


def derived_seed(seed: int, index: int) -> int:
    """A seed for one batch or prompt, 0 <= seed < 2^31, unrelated to those of its neighbors."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


def library_versions(engine: EngineName, *, has_adapter: bool) -> dict[str, str]:
    """Versions of the libraries that influence the generated tokens."""
    names = ["torch", "transformers", *(["vllm"] if engine == "vllm" else [])]
    if has_adapter and engine == "transformers":
        names.append("peft")
    return {name: importlib.metadata.version(name) for name in names}


def device_name() -> str:
    """Name of the device that generates."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
