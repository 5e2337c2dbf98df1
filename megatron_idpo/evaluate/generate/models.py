"""The models that answer: found, looked at and told apart, before a weight is loaded.

Any causal language model of Transformers can answer, also of families that cannot be trained here,
so nothing of `convert/model_source.py`, which knows those alone, is asked of it.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idpo.checkpoint.snapshot_metadata import file_digest
from megatron_idpo.config.sections import ModelConfig
from megatron_idpo.convert.hf_io.tokenizer_files import CONFIG_FILE, read_json_object
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.engine import EngineName
from megatron_idpo.evaluate.models import Subject

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class AnsweringModel:
    """A Hugging Face model, it may be with an adapter, of which only small files were read."""

    name: str
    directory: Path
    adapter: Path | None
    context_tokens: int | None
    """Positions that the model has; None: unlimited."""

    vocab_size: int
    end_tokens: frozenset[int]
    """Tokens that end an answer, by the model's own word."""


def open_answering(subject: Subject, engine: EngineName) -> AnsweringModel:
    """Look at a model; a hub model is downloaded if it is not here yet.

    Raises:
        ConfigError: it is a checkpoint of ours, nothing, or no language model; or the adapter is
            not there, or cannot be used without PEFT.
        CheckpointError: a configuration file cannot be read.
    """
    location = f"model {subject.name}"
    directory = Path(subject.path).expanduser()
    if not directory.is_dir():
        directory = _from_hub(subject.path, location)
    if not (directory / CONFIG_FILE).is_file():
        if (directory / "metadata.json").is_file():
            message = f"{subject.path} is a torch_dist checkpoint, which cannot generate"
            remedy = f"convert it: megatron-idpo convert megatron-to-hf {subject.path} DIRECTORY"
            raise ConfigError.at(location, message, f"{remedy}, and name DIRECTORY")
        message = f"{subject.path} has no {CONFIG_FILE}"
        raise ConfigError.at(
            location, message, "name a Hugging Face model's directory, or a hub name"
        )
    if not any(next(directory.glob(pattern), None) for pattern in _WEIGHT_FILES):
        message = f"{subject.path} has no weights"
        raise ConfigError.at(location, message, "name a complete model's directory")
    if subject.adapter is not None:
        _check_adapter(subject.adapter, location, engine)
    config = _language_config(directory, location)
    return AnsweringModel(
        subject.name,
        directory,
        subject.adapter,
        getattr(config, "max_position_embeddings", None),
        config.vocab_size,
        _end_tokens(directory, config),
    )


def identities(model: AnsweringModel) -> tuple[str, str | None]:
    """sha256 of the model's configuration and weights, and of the adapter; every byte is read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = [model.directory / CONFIG_FILE]
    files += [path for glob in _WEIGHT_FILES for path in sorted(model.directory.glob(glob))]
    if model.adapter is None:
        return _digest(files), None
    adapter = [path for name in _ADAPTER_FILES if (path := model.adapter / name).is_file()]
    return _digest(files), _digest(adapter)


def tokenizer_of(model: AnsweringModel, config: ModelConfig, run_tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer through which a model reads prompts.

    It is the run's, with the run's chat template, for every model with the same vocabulary, for one
    without a tokenizer, and for all where `model.tokenizer` is set. A model of another kind is
    asked in its own tokens and its own template.

    Raises:
        DataError: its tokenizer cannot be read.
    """
    if config.tokenizer is not None:
        return run_tokenizer
    if not any((model.directory / name).is_file() for name in _TOKENIZER_FILES):
        return run_tokenizer
    own = load_tokenizer(str(model.directory))
    same = own.vocabulary_identity == run_tokenizer.vocabulary_identity
    return run_tokenizer if same else own


def _check_adapter(adapter: Path, location: str, engine: EngineName) -> None:
    """Refuse what PEFT could not load.

    Raises:
        ConfigError: it is no adapter, or PEFT is not installed.
    """
    if not (adapter / _ADAPTER_FILES[0]).is_file():
        message = f"{adapter} has no {_ADAPTER_FILES[0]}, so it is no PEFT adapter"
        raise ConfigError.at(f"{location}, adapter", message, "name the directory of one")
    if engine == "transformers" and importlib.util.find_spec("peft") is None:
        message = "answering with an adapter needs the library peft, which is not installed"
        raise ConfigError.at(f"{location}, adapter", message, "install it: pip install peft")


def _language_config(directory: Path, location: str) -> Any:
    """The part of Transformers' configuration that is about text.

    Raises:
        ConfigError: Transformers does not know the model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    # A configuration of an unknown kind fails wherever the library happens to look first.
    except Exception as error:
        message = f"Transformers cannot read {directory / CONFIG_FILE}: {error}"
        raise ConfigError.at(location, message, "name a model that it knows") from error


def _end_tokens(directory: Path, config: Any) -> frozenset[int]:
    """EOS of the generation config, in which chat models also name the end of a turn."""
    ends = getattr(config, "eos_token_id", None)
    path = directory / "generation_config.json"
    if path.is_file():
        ends = read_json_object(path).get("eos_token_id", ends)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()


def _from_hub(name: str, location: str) -> Path:
    """The snapshot of a hub model, downloaded where it is not in the cache.

    Raises:
        ConfigError: the hub has none, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's own errors, and those of four network libraries
        message = f"{name} is no directory, and the hub cannot give it ({type(error).__name__})"
        remedy = f"check the name, or fetch it where there is a network: hf download {name}"
        raise ConfigError.at(location, message, remedy) from error
