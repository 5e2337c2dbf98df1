"""Tokenizers behind one small protocol: Hugging Face's, and bare sentencepiece models.

A hub name or a directory goes to `AutoTokenizer`, except for one that has a sentencepiece model and
no `tokenizer.json`: that, or a `.model` file, goes to the sentencepiece library itself
(`sentence_piece.py`), because Transformers 5 converts such a file to BPE whatever it is and then
segments unigram models differently without a word (measured: 200 of 204 sentences).

Rendering and encoding are separate steps, so that the text of the prompt can be compared with the
text of prompt and answer (`chat.py`).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_idpo.data.tokenize.sentencepiece import SentencePieceTokenizer
from megatron_idpo.errors import DataError


class Tokenizer(Protocol):
    """What tokenising preference pairs needs; picklable, so that workers can have copies."""

    identity: str
    """sha256 over everything that decides which tokens a text or a conversation becomes."""

    vocabulary_identity: str
    """sha256 over what decides which tokens a text becomes: all but the chat template."""

    template_identity: str
    """sha256 over the chat template."""

    has_chat_template: bool

    eos_id: int | None
    eos_text: str | None

    special_ids: frozenset[int]
    """Ids of control tokens: BOS, EOS, end-of-turn and their like."""

    vocab_size: int
    """Every id is below this."""

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        """The conversation as the chat template writes it; `tools` and others by keyword."""

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; with `special_tokens` also BOS (and EOS) if it adds them."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, control tokens spelled out."""


class HfTokenizer:
    """A Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: a `transformers.PreTrainedTokenizerBase`."""
        self._hf = tokenizer
        self.has_chat_template = bool(tokenizer.chat_template)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.eos_text: str | None = tokenizer.eos_token
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            number for number, token in added.items() if token.special
        }
        self.vocab_size = max(len(tokenizer), *(number + 1 for number in added), 1)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = _format_backend(backend) if backend else json.dumps(tokenizer.get_vocab())
        named = (type(tokenizer).__name__, vocabulary)
        template = tokenizer.chat_template
        special = {
            name: str(text)
            for name, text in tokenizer.special_tokens_map.items()
            if name != "pad_token"  # pads batches, of which there are none here
        }
        self.identity = _digest(*named, template, special)
        self.vocabulary_identity = _digest(*named, special)
        self.template_identity = _digest(template)

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        """See `Tokenizer.render`."""
        rendered = self._hf.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )
        assert isinstance(rendered, str)
        return rendered

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        if not texts:
            return []
        encoded: list[list[int]] = self._hf(
            list(texts),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # Texts longer than the model's length are cut later, and counted.
        )["input_ids"]
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        text = self._hf.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def load_tokenizer(path: str, chat_template: str | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: a model's directory or hub name, or a sentencepiece `.model` file.
        chat_template: a Jinja template, or a file that holds one, instead of the tokenizer's own.

    Raises:
        DataError: there is no such tokenizer, it cannot be read, or the template's syntax is wrong.
    """
    template = read_template(chat_template)
    model_file = _bare_model(Path(path))
    tokenizer: Tokenizer
    if model_file is not None:
        tokenizer = SentencePieceTokenizer.from_file(model_file, template)
    else:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(path)
        # The library raises whatever the parser of the file at hand raises.
        except Exception as error:
            raise DataError.at(
                path, f"no tokenizer can be loaded: {error}", "give a model's directory or hub name"
            ) from error
        if template is not None:
            loaded.chat_template = template
        tokenizer = HfTokenizer(loaded)
    if tokenizer.has_chat_template:
        _check_syntax(tokenizer, path if template is None else "data.chat_template")
    return tokenizer


def _bare_model(path: Path) -> Path | None:
    """The sentencepiece file to use, where nothing better describes the tokenizer."""
    if path.suffix == ".model":
        if not path.is_file():
            raise DataError.at(str(path), "no such file", "check the tokenizer's path")
        return path
    bare = path / "tokenizer.model"
    return bare if bare.is_file() and not (path / "tokenizer.json").exists() else None


def read_template(value: str | None) -> str | None:
    """The template itself: whatever has a brace is one, anything else names a file."""
    if value is None or "{" in value:
        return value
    try:
        return Path(value).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(
            "data.chat_template", f"cannot read '{value}': {error}", "a Jinja template or its file"
        ) from None


def _check_syntax(tokenizer: Tokenizer, location: str) -> None:
    """Refuses a template that no conversation could be rendered with, before any row is blamed."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        reason = f"the chat template has a syntax error in line {error.lineno}: {error.message}"
        raise DataError.at(location, reason, "correct it or set data.chat_template") from None
    # A template may refuse this conversation, in any way, and render the data's: rows tell.
    except Exception:
        return


def _format_backend(backend: Any) -> str:
    """All that decides which tokens a text becomes, and not how a batch would be padded or cut."""
    message = json.loads(backend.to_str())
    decisive = message.keys() - {"padding", "truncation"}
    return json.dumps({name: message[name] for name in sorted(decisive)})


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
