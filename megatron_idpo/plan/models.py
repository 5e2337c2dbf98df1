"""`ModelSizes`: what a plan needs to know about a model, from its config.json or a table.

The file is read without torch and Transformers, so that a plan takes a second. It is checked when
the model is loaded (`mcore/model/hf_config.py`); here only the sizes are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_idpo.config.layout import ModelShape
from megatron_idpo.errors import ConfigError

_LLAMA_LIKE = (
    *("llama", "mistral", "mixtral", "ministral3", "smollm3", "phi3"),
    *("granite", "seed_oss", "gemma", "glm", "ernie4_5"),
)
_POST = {"has_post_norms": True}
_OLMO = {"has_pre_norms": False, "has_post_norms": True, "qk_norm": True}
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    **{family: {} for family in _LLAMA_LIKE},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen2_moe": {"qkv_bias": True},
    "qwen3_moe": {"qk_norm": True},
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "glm4": _POST,
    "gemma2": _POST,
    "gemma3_text": {**_POST, "qk_norm": True},
}
"""Families of `mcore.model.families`, and what distinguishes their layers' sizes from Llama's."""

_GELU = ("gemma", "gemma2", "gemma3_text")
_WHOLE_QK_NORM = ("olmo2", "olmo3")

HEAD_DIM = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "seed_oss": 128}
HEAD_DIM |= {"glm": 128, "glm4": 128, "ernie4_5": 128}
TIED = {"gemma", "gemma2", "gemma3_text", "smollm3", "ernie4_5"}
"""What Transformers takes where a file says nothing."""


def _attention_bias(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if family == "qwen2_moe":
        return {"qkv_bias": bool(config.get("qkv_bias", True))}
    if family not in ("glm", "glm4", "seed_oss"):
        return {}
    return {"qkv_bias": bool(config.get("attention_bias", True))}


@dataclass(frozen=True, kw_only=True)
class ModelSizes(ModelShape):
    """Sizes of a decoder with RMSNorm, a gated MLP without biases and rope.

    `mcore.model.architecture.Architecture` has these attributes too, and explains them.
    """

    hidden_size: int
    head_dim: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    has_pre_norms: bool = True
    has_post_norms: bool = False
    experts_per_token: int = 0
    """0: dense."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], location: str) -> Self:
        """From a parsed config.json.

        Raises:
            ConfigError: a size is missing, or the family is not supported.
        """
        family = str(config.get("model_type"))
        if family not in FAMILY_FIELDS:
            remedy = f"use a model of {', '.join(FAMILY_FIELDS)}"
            raise ConfigError.at(location, f"model_type {family!r} is not supported", remedy)
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        ffn = "moe_intermediate_size" if family.endswith("_moe") else "intermediate_size"
        names += ["shared_expert_intermediate_size"] * (family == "qwen2_moe")
        missing = [name for name in (*names, ffn) if not isinstance(config.get(name), int)]
        if missing:
            remedy = "give the directory of a Hugging Face model"
            raise ConfigError.at(location, f"has no {', '.join(missing)}", remedy)
        heads = config["num_attention_heads"]
        experts = config.get("num_local_experts") or config.get("num_experts") or 0
        is_mixed = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
        if experts and is_mixed:
            message = "has layers without experts, which are not estimated"
            remedy = "plan with a copy of the file without mlp_only_layers and decoder_sparse_step"
            raise ConfigError.at(location, message, remedy)
        return cls(
            family=family,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            ffn_hidden_size=config[ffn],
            vocab_size=config["vocab_size"],
            num_experts=experts,
            experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
            shared_ffn_hidden_size=config.get("shared_expert_intermediate_size") or 0,
            hidden_size=config["hidden_size"],
            head_dim=config.get("head_dim") or HEAD_DIM.get(family, config["hidden_size"] // heads),
            tied_embeddings=bool(config.get("tie_word_embeddings", family in TIED)),
            **FAMILY_FIELDS[family] | _attention_bias(family, config),
        )

    @property
    def query_width(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each matrix of a layer, or of one of its experts."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        return {
            "q_proj": (hidden, self.query_width),
            "k_proj": (hidden, self.key_width),
            "v_proj": (hidden, self.key_width),
            "o_proj": (self.query_width, hidden),
            "gate_proj": (hidden, ffn),
            "up_proj": (hidden, ffn),
            "down_proj": (ffn, hidden),
        }

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's four attention matrices."""
        return 2 * self.hidden_size * (self.query_width + self.key_width)

    @property
    def mlp_weights(self) -> int:
        """Weights of a layer's MLP, or of one expert."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def shared_weights(self) -> int:
        """Weights of a layer's expert for all tokens, and of its gate."""
        shared = self.shared_ffn_hidden_size
        return self.hidden_size * (3 * shared + 1) if shared else 0

    @property
    def uses_gelu(self) -> bool:
        """Whether the MLP has a gated GELU instead of a SiLU."""
        return self.family in _GELU

    @property
    def whole_qk_norm(self) -> bool:
        """Whether the features of all heads are normed together."""
        return self.family in _WHOLE_QK_NORM

    @property
    def qk_norm_weights(self) -> int:
        """Weights of the norms of queries and keys: OLMo norms all heads together."""
        widths = self.query_width + self.key_width if self.whole_qk_norm else 2 * self.head_dim
        return widths * self.qk_norm

    @property
    def norms(self) -> int:
        """Norms of a layer, apart from those of queries and keys."""
        return 2 * (self.has_pre_norms + self.has_post_norms)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        layer = self.attention_weights + self.norms * self.hidden_size
        layer += (self.query_width + 2 * self.key_width) * self.qkv_bias + self.qk_norm_weights
        layer += self.mlp_weights * max(self.num_experts, 1) + self.num_experts * self.hidden_size
        layer += self.shared_weights
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


def _sizes(
    family: str, layers: int, hidden: int, heads: tuple[int, int], ffn: int, vocab: int, **more: Any
) -> ModelSizes:
    """A line of the table; `heads` are those of queries and of keys."""
    config = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": ffn,
        "vocab_size": vocab,
        **more,
    }
    return ModelSizes.from_hf(config, "plan.models")


KNOWN: tuple[tuple[str, ModelSizes], ...] = (
    # Each: names, lower case, without the suffixes below, and sizes from the model's config.json.
    (r"(?:meta-)?llama-?3(?:\.1)?-8b", _sizes("llama", 32, 4096, (32, 8), 14336, 128256)),
    (r"(?:meta-)?llama-?3(?:\.[13])?-70b", _sizes("llama", 80, 8192, (64, 8), 28672, 128256)),
    (r"mistral-7b(?:-instruct)?-v0\.3", _sizes("mistral", 32, 4096, (32, 8), 14336, 32768)),
    (
        r"mistral-7b(?:(?:-instruct)?-v0\.[12])?|zephyr-7b(?:-sft)?",
        _sizes("mistral", 32, 4096, (32, 8), 14336, 32000),
    ),
    (r"solar-10\.7b(?:-instruct)?-v1\.0", _sizes("llama", 48, 4096, (32, 8), 14336, 32000)),
    (r"qwen2\.5-7b", _sizes("qwen2", 28, 3584, (28, 4), 18944, 152064)),
    (r"qwen2\.5-72b", _sizes("qwen2", 80, 8192, (64, 8), 29568, 152064)),
    (r"qwen3-8b", _sizes("qwen3", 36, 4096, (32, 8), 12288, 151936, head_dim=128)),
    (
        r"mixtral-8x7b(?:-instruct)?-v0\.1",
        _sizes(
            "mixtral", 32, 4096, (32, 8), 14336, 32000, num_local_experts=8, num_experts_per_tok=2
        ),
    ),
    (
        r"qwen3-30b-a3b",
        _sizes(
            "qwen3_moe",
            48,
            2048,
            (32, 4),
            6144,
            151936,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    (r"smollm2(?:-135m)?", _sizes("llama", 30, 576, (9, 3), 1536, 49152, tie_word_embeddings=True)),
)
"""Models that the examples name, and a few others."""

_SUFFIXES = r"(?:-(?:instruct|chat|it|base|hf|alpha|beta|full|25\d\d))*"
"""What may follow a name without changing the sizes. Anything else may be another model."""


@dataclass(frozen=True, slots=True)
class ModelFound:
    """A model's sizes and where they come from."""

    sizes: ModelSizes
    source: str
    """A file, or `table of known models`."""

    is_here: bool
    """Whether a file on this machine was read."""


def find_model(path: str) -> ModelFound:
    """The sizes of `model.path`: a directory, a model in the hub's cache, or a known name.

    Raises:
        ConfigError: it is none of them, or its config.json cannot be read.
    """
    for file in _config_files(path):
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError.at(str(file), f"cannot be read: {error}", "repair it") from None
            return ModelFound(ModelSizes.from_hf(config, str(file)), str(file), is_here=True)
    name = Path(path).name.lower()
    for pattern, sizes in KNOWN:
        if re.fullmatch(rf"(?:{pattern}){_SUFFIXES}", name):
            return ModelFound(sizes, "table of known models", is_here=False)
    if len(Path(path).parts) > 2 or path.startswith((".", "~", "/")):
        remedy = "name a model directory, or a hub model such as organization/model"
        raise ConfigError.at("model.path", f"{path} is not a directory", remedy)
    message = f"{path} is not on this machine, and its sizes are not known"
    remedy = f"download its config.json: hf download {path} config.json"
    raise ConfigError.at("model.path", message, remedy)


def _config_files(path: str) -> list[Path]:
    directory = Path(path).expanduser()
    files = [directory / "config.json", directory / "huggingface" / "config.json"]
    if directory.is_dir() or len(Path(path).parts) != 2 or path.startswith((".", "~", "/")):
        return files
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return files
    return [*files, Path(cached)] if isinstance(cached, str) else files
