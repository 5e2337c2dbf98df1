"""Tokenizer files of a Hugging Face checkpoint: their names, and the largest token id in them.

The files are parsed directly (JSON, sentencepiece) instead of through Transformers. That takes
milliseconds instead of seconds, runs no code from the checkpoint, and gives ids instead of counts:
a tokenizer with gaps has larger ids than its length.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.provenance import read_record

CONFIG_FILE = "config.json"

SENTENCEPIECE_FILE = "tokenizer.model"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    SENTENCEPIECE_FILE,
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


LICENSE_FILES = (
    "LICENSE*",
    "LICENCE*",
    "license*",
    "COPYING*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
)
"""Patterns of the files that a license requires to be passed on with a model."""


class Token(NamedTuple):
    """A token and the file that defines it."""

    id: int
    text: str
    path: Path


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object.
    """
    return read_record(path, error=CheckpointError, remedy="")


def check_vocabulary(directory: Path, vocab_size: object) -> None:
    """Checks that the model has an embedding for every token id; it may have more.

    One token may lie behind the embeddings: the padding token, which fine-tuning scripts of Llama 2
    added without resizing the model. No text contains it, and batches are not padded here.

    Args:
        directory: of `config.json` and of the tokenizer files, if there are any.
        vocab_size: value in `config.json`.

    Raises:
        CheckpointError: an id is not below `vocab_size`, or that is not an integer; a tokenizer
            file does not have the expected content.
    """
    if not isinstance(vocab_size, int):
        path = str(directory / CONFIG_FILE)
        raise CheckpointError.at(path, f"vocab_size is {vocab_size!r}, not an integer")
    tokens = [token for token in _tokens(directory) if not _is_spare_padding(token, vocab_size)]
    token = max(tokens, default=None)  # by id, the first field
    if token is not None and token.id >= vocab_size:
        raise CheckpointError.at(
            str(token.path),
            f"token {token.text!r} has the id {token.id}, but vocab_size in {CONFIG_FILE} is "
            f"{vocab_size}: the model has no embedding for it",
            "use the model's own tokenizer, or resize the embeddings to it",
        )


_PADDING_TEXTS = ("[PAD]", "<pad>", "<|pad|>")


def _is_spare_padding(token: Token, vocab_size: int) -> bool:
    """Whether this is a padding token behind the last embedding."""
    return token.id == vocab_size and token.text in _PADDING_TEXTS


def _tokens(directory: Path) -> Iterator[Token]:
    """The tokens of all files; the base vocabulary is read from one file only."""
    vocabularies = {
        "tokenizer.json": _fast_tokens,
        "tokenizer.model": _sentencepiece_tokens,
        "vocab.json": _id_by_text,
    }
    additions = {"added_tokens.json": _id_by_text, "tokenizer_config.json": _added_in_config}
    present = [name for name in vocabularies if (directory / name).is_file()][:1]
    present += [name for name in additions if (directory / name).is_file()]
    for name in present:
        path = directory / name
        try:
            for token_id, text in (vocabularies | additions)[name](path):
                yield Token(int(token_id), str(text), path)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"is not a valid tokenizer file: {type(error).__name__}: {error}"
            raise CheckpointError.at(str(path), reason) from None


def _fast_tokens(path: Path) -> Iterator[tuple[int, str]]:
    """`tokenizer.json`: the vocabulary, a mapping or (Unigram) a list, and added tokens."""
    document = read_json_object(path)
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        yield from enumerate(piece for piece, *_ in vocabulary)
    else:
        yield from ((token_id, text) for text, token_id in vocabulary.items())
    for token in document.get("added_tokens") or []:
        yield token["id"], token["content"]


def _id_by_text(path: Path) -> Iterator[tuple[int, str]]:
    """`vocab.json`, `added_tokens.json`: {text: id}."""
    yield from ((token_id, text) for text, token_id in read_json_object(path).items())


def _added_in_config(path: Path) -> Iterator[tuple[int, str]]:
    """`tokenizer_config.json`: {"added_tokens_decoder": {id: {"content": text}}}."""
    added = read_json_object(path).get("added_tokens_decoder") or {}
    yield from ((token_id, token["content"]) for token_id, token in added.items())


def _sentencepiece_tokens(path: Path) -> Iterator[tuple[int, str]]:
    """`tokenizer.model`: only the last piece, because ids are consecutive from 0."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"sentencepiece cannot load it ({error})") from None
    last = processor.get_piece_size() - 1
    yield last, processor.id_to_piece(last)
