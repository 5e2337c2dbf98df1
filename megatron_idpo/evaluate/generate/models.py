"""The models that answer, and what each has to generate.

Everything that can be checked before loading weights is checked by `inspect_model`.

Any causal language model of Transformers can answer, including families that cannot be trained
here. `convert/model_source.py` knows only the trainable ones, so it is not used.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_idpo.config.data import ModelConfig
from megatron_idpo.config.evaluate import GenerateConfig
from megatron_idpo.convert.hf_io.end_tokens import GENERATION_CONFIG_FILE, end_tokens
from megatron_idpo.convert.hf_io.hub import download_model
from megatron_idpo.convert.hf_io.tokenizer_files import CONFIG_FILE
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import ConfigError, library_reason
from megatron_idpo.evaluate.generate.engine import EngineName
from megatron_idpo.evaluate.generate.prompts import PromptRecord
from megatron_idpo.evaluate.models import EvalModel
from megatron_idpo.storage.provenance import file_digest

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (_ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class InspectedModel:
    """A Hugging Face model whose small files were read; its weights are not loaded."""

    name: str
    directory: Path
    adapter: Path | None
    """Directory of a PEFT adapter."""

    dtype: torch.dtype
    """To load the weights in."""

    context_tokens: int | None
    """Maximum number of positions; None: unlimited."""

    vocab_size: int
    end_tokens: tuple[int, ...]
    """Tokens that end an answer according to the model's files."""


@dataclass(frozen=True, slots=True)
class Task:
    """The answers that one model has to generate."""

    model: InspectedModel
    tokenizer: Tokenizer
    records: Sequence[PromptRecord]
    prompts: Sequence[Sequence[int]]
    """Token ids of each record."""

    stop_tokens: Sequence[int]
    sampling: GenerateConfig
    seed: int
    settings: Mapping[str, Mapping[str, Any]]
    """What the answers depend on: section -> field -> JSON value."""

    batch_prompts: int
    engine: EngineName
    path: Path


def inspect_model(model: EvalModel, dtype: torch.dtype, engine: EngineName) -> InspectedModel:
    """Inspects a model; a hub model is downloaded if it is not in the cache.

    Raises:
        ConfigError: it is not a complete Hugging Face language model; or the adapter is missing,
            or needs PEFT, which is not installed.
        CheckpointError: a configuration file cannot be read, or a hub model not downloaded.
    """
    location, remedy = f"model {model.name}", "name a complete Hugging Face model directory"
    directory = Path(model.path).expanduser()
    if not directory.is_dir():
        directory = download_model(model.path, location)
    if not (directory / CONFIG_FILE).is_file():
        message = f"{model.path} has no {CONFIG_FILE}"
        if (directory / "metadata.json").is_file():
            message = f"{model.path} is a torch_dist checkpoint, which cannot generate"
            command = f"megatron-idpo convert megatron-to-hf {model.path} DIRECTORY"
            remedy = f"convert it with `{command}`, and name DIRECTORY"
        raise ConfigError.at(location, message, remedy)
    if not any(next(directory.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise ConfigError.at(location, f"{model.path} has no weights", remedy)
    if model.adapter is not None and not (model.adapter / _ADAPTER_CONFIG).is_file():
        message = f"{model.adapter} has no {_ADAPTER_CONFIG}"
        raise ConfigError.at(location, message, "name the directory of a PEFT adapter")
    if model.adapter and engine == "transformers" and importlib.util.find_spec("peft") is None:
        message = "generating with an adapter needs the library peft, which is not installed"
        raise ConfigError.at(location, message, "pip install peft")
    config = _text_config(directory, location)
    return InspectedModel(
        model.name,
        directory,
        model.adapter,
        dtype,
        getattr(config, "max_position_embeddings", None),
        config.vocab_size,
        _end_tokens(directory, model.adapter, config),
    )


def content_digests(model: InspectedModel) -> tuple[str, str | None]:
    """sha256 of the model's config and weights, and of the adapter; reads every byte.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = [model.directory / CONFIG_FILE]
    files += [path for glob in _WEIGHT_FILES for path in sorted(model.directory.glob(glob))]
    if model.adapter is None:
        return _digest(files), None
    adapter = [path for name in _ADAPTER_FILES if (path := model.adapter / name).is_file()]
    return _digest(files), _digest(adapter)


def model_tokenizer(
    model: InspectedModel, config: ModelConfig, run_tokenizer: Tokenizer
) -> Tokenizer:
    """The tokenizer that encodes prompts for a model.

    This is the run's tokenizer with the run's chat template, if `model.tokenizer` is set, or the
    model has the same vocabulary or no tokenizer; otherwise the model's own.

    Raises:
        DataError: the model's tokenizer cannot be read.
    """
    has_own = any((model.directory / name).is_file() for name in _TOKENIZER_FILES)
    if config.tokenizer is not None or not has_own:
        return run_tokenizer
    own = load_tokenizer(str(model.directory))
    is_same = own.encoding_identity == run_tokenizer.encoding_identity
    return run_tokenizer if is_same else own


def _text_config(directory: Path, location: str) -> Any:
    """The text part of a model's Transformers configuration.

    Raises:
        ConfigError: Transformers does not know the model type.
    """
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        return loaded.get_text_config()
    # An unknown configuration can raise almost any type of exception.
    except Exception as error:
        message = f"Transformers cannot read {directory / CONFIG_FILE}: {library_reason(error)}"
        raise ConfigError.at(location, message, "name a model of a known type") from error


def _end_tokens(directory: Path, adapter: Path | None, config: Any) -> tuple[int, ...]:
    """End tokens of the files: an adapter's generation config replaces that of its base model."""
    if adapter is not None and (adapter / GENERATION_CONFIG_FILE).is_file():
        return tuple(end_tokens(adapter))
    return tuple(end_tokens(directory, getattr(config, "eos_token_id", None)))


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
