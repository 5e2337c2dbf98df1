"""Where the files of a Hugging Face model say that an answer ends.

| file | read by |
| --- | --- |
| `generation_config.json`: `eos_token_id` | Transformers and vLLM; they stop at each token |
| `config.json`: `eos_token_id` | Transformers without a generation config; converters |
| `tokenizer_config.json`, `special_tokens_map.json`: `eos_token` | vLLM, in addition; converters |
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_idpo.convert.hf_io.tokenizer_files import CONFIG_FILE, read_json_object
from megatron_idpo.errors import CheckpointError

GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

_EOS_ID = "eos_token_id"
_GENERATION_FIELDS = ("bos_token_id", _EOS_ID, "pad_token_id")
"""What Transformers takes from `config.json` without a generation config."""

_EOS_ID_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE)
_FILES = (*_EOS_ID_FILES, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)


def end_tokens(directory: Path, config_eos: object = None) -> list[int]:
    """The tokens at which Transformers and vLLM end an answer, by the files of a model.

    Args:
        directory: of the model.
        config_eos: `eos_token_id` of `config.json`, for a model without a generation config.

    Raises:
        CheckpointError: the generation config cannot be read, or its value is not token ids.
    """
    path = directory / GENERATION_CONFIG_FILE
    if path.is_file():
        return _ids(read_json_object(path).get(_EOS_ID), path)
    return _ids(config_eos, directory / CONFIG_FILE)


def with_end_tokens(
    files: Sequence[Path], directory: Path, tokens: Sequence[int], eos: str | None = None
) -> tuple[Path, ...]:
    """Companion files of a model that name additional end tokens.

    Files that name them already are kept as they are; tokens that they name in addition remain.
    With tokens that `config.json` does not name, a missing generation config is added, as
    Transformers would derive it.

    Args:
        files: configuration, generation config and tokenizer files.
        directory: for changed copies.
        tokens: that end answers.
        eos: new spelling of EOS in the tokenizer's files; None keeps it.

    Raises:
        CheckpointError: a file cannot be read, or is not the expected JSON.
    """
    by_name = {path.name: path for path in files}
    config = read_json_object(by_name[CONFIG_FILE])
    fields_of = {name: read_json_object(path) for name, path in by_name.items() if name in _FILES}
    derived = {name: config[name] for name in _GENERATION_FIELDS if config.get(name) is not None}
    if {*tokens} - {*_ids(config.get(_EOS_ID), by_name[CONFIG_FILE])}:
        fields_of.setdefault(GENERATION_CONFIG_FILE, derived)
    for name, before in fields_of.items():
        after = dict(before)
        if name in _EOS_ID_FILES:
            listed = _ids(before.get(_EOS_ID), by_name.get(name, Path(name)))
            if new := [token for token in tokens if token not in listed]:
                ids = [*listed, *new]
                after[_EOS_ID] = ids if len(ids) > 1 else ids[0]
                # Transformers would derive a file with this mark from config.json again.
                after.pop("_from_model_config", None)
        elif eos is not None:
            after["eos_token"] = eos
        if after != before:
            by_name[name] = directory / name
            text = json.dumps(after, indent=2, ensure_ascii=False)
            by_name[name].write_text(text + "\n", encoding="utf-8")
    return tuple(by_name.values())


def _ids(value: object, path: Path) -> list[int]:
    """`eos_token_id`: null, a token id or a list of them.

    Raises:
        CheckpointError: it is anything else.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ids):
        remedy = "a token id or a list of them"
        raise CheckpointError.at(str(path), f"{_EOS_ID} is {value!r}, not token ids", remedy)
    return list(dict.fromkeys(ids))
