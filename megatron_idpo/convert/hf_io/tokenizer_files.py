"""The tokenizer of a Hugging Face checkpoint, as far as a conversion cares: files and largest id.

The files are read as what they are, JSON or sentencepiece, rather than through Transformers: that
takes milliseconds instead of seconds, runs no code from the checkpoint, and tells ids from counts
(a tokenizer with gaps has larger ids than its length suggests). Nothing is tokenized here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_idpo.errors import CheckpointError

CONFIG_FILE = "config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Token(NamedTuple):
    """A token and where it was found."""

    id: int
    text: str
    path: Path


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: the file is missing, unreadable or something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError.at(str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError.at(str(path), f"is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError.at(str(path), "is no JSON object")
    return document


def largest_token(directory: Path) -> Token | None:
    """The token with the largest id that the tokenizer's files know; None without a tokenizer.

    Raises:
        CheckpointError: a tokenizer file is not what its name says.
    """
    return max(_tokens(directory), default=None)


def check_vocabulary(directory: Path, vocab_size: object) -> None:
    """The model has an embedding for every id of the tokenizer; more of them are normal.

    Args:
        directory: where the tokenizer's files are, if there are any, and `config.json`.
        vocab_size: what `config.json` says.

    Raises:
        CheckpointError: an id is beyond `vocab_size`, or that is no number.
    """
    if not isinstance(vocab_size, int):
        path = str(directory / CONFIG_FILE)
        raise CheckpointError.at(path, f"vocab_size is {vocab_size!r}, not a number")
    token = largest_token(directory)
    if token is not None and token.id >= vocab_size:
        raise CheckpointError.at(
            str(token.path),
            f"token {token.text!r} has the id {token.id}, but vocab_size in {CONFIG_FILE} is "
            f"{vocab_size}: the model has no embedding for it",
            "use the model's own tokenizer, or resize the embeddings to it",
        )


def _tokens(directory: Path) -> Iterator[Token]:
    """Every token of every file that holds some; base vocabularies come from one file only."""
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
            reason = f"is no tokenizer file as expected: {type(error).__name__}: {error}"
            raise CheckpointError.at(str(path), reason) from None


def _fast_tokens(path: Path) -> Iterator[tuple[int, str]]:
    """`tokenizer.json`: the model's vocabulary, a table or (Unigram) a list, and added tokens."""
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
    """`tokenizer.model`: only the last piece, ids are counted from 0."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"sentencepiece cannot load it ({error})") from None
    last = processor.get_piece_size() - 1
    yield last, processor.id_to_piece(last)
