"""Tokenizers behind one small interface: Hugging Face's, and bare sentencepiece models.

A hub name or a directory is loaded by `AutoTokenizer`. Exception: a `.model` file, or a directory
that has one and no `tokenizer.json`, is read by the sentencepiece library itself, because
Transformers 5 converts every such file to BPE and then segments unigram models differently without
a warning (measured: 200 of 204 sentences).

Rendering and encoding are separate steps, so that the text of the prompt can be compared with the
text of prompt and answer (`chat.py`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_idpo.errors import DataError, library_reason

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

type Tokenizer = HfTokenizer | SentencePieceTokenizer
"""Either kind; picklable, for worker processes."""


class HfTokenizer:
    """A Hugging Face tokenizer.

    Attributes:
        identity: sha256 over everything that affects the tokens of a text or a conversation.
        vocabulary_identity: sha256 over what affects the tokens of a text: all but the template.
        encoding_identity: the same without the choice of EOS, which ends the texts of pairs only.
        template_identity: sha256 over the chat template.
        special_ids: ids of control tokens: BOS, EOS, end-of-turn and similar.
        added_ids: ids of all tokens that were added to the vocabulary, control tokens or not.
        eos_text: how EOS is spelled; empty if there is none.
        control_texts: matches how control tokens are spelled.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Args: a `transformers.PreTrainedTokenizerBase`."""
        self._hf = tokenizer
        self.has_chat_template = bool(tokenizer.chat_template)
        self.eos_id: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in added.items() if token.special
        }
        self.added_ids = frozenset(added)
        self.eos_text = str(tokenizer.eos_token or "")
        self.control_texts = _any_of(tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = _backend_json(backend) if backend else json.dumps(tokenizer.get_vocab())
        named = (type(tokenizer).__name__, vocabulary)
        template = tokenizer.chat_template
        special = {
            name: str(text)
            for name, text in tokenizer.special_tokens_map.items()
            if name != "pad_token"  # Only pads batches, which are not used here.
        }
        self.identity = _digest(*named, template, special)
        self.vocabulary_identity = _digest(*named, special)
        special.pop("eos_token", None)
        self.encoding_identity = _digest(*named, special)
        self.template_identity = _digest(template)

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        """The conversation as the chat template writes it; `tools` etc. are keywords."""
        rendered: str = self._hf.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )
        return rendered

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; with `special_tokens` also BOS (and EOS) if it adds them."""
        if not texts:
            return []
        encoded: list[list[int]] = self._hf(
            list(texts),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # Long texts are truncated later, and counted.
        )["input_ids"]
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, control tokens spelled out."""
        text: str = self._hf.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class SentencePieceTokenizer:
    """A sentencepiece model, read by the sentencepiece library.

    The library does not recognize control tokens in text, but chat templates write them into text.
    The text is therefore split at their spellings, and each piece between them is encoded alone,
    with the model's own dummy prefix, as in Meta's reference code for Llama 2.
    """

    def __init__(
        self,
        model: bytes,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Args: the file's bytes; a Jinja template; the values of `tokenizer_config.json`."""
        config = config or {}
        self._model = model
        self._template = chat_template or config.get("chat_template")
        processor = self._processor
        pieces = range(processor.get_piece_size())
        self._control = {processor.id_to_piece(i): i for i in pieces if processor.is_control(i)}
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            if int(token_id) != processor.unk_id():
                self._control[token["content"]] = int(token_id)
        self._spelling = {token_id: text for text, token_id in self._control.items()}
        self._add_bos = bool(config.get("add_bos_token", True)) and processor.bos_id() >= 0
        self.has_chat_template = self._template is not None
        self.eos_id: int | None = processor.eos_id() if processor.eos_id() >= 0 else None
        eos = config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if eos in self._control:
            self.eos_id = self._control[eos]
        self.special_ids = self.added_ids = frozenset(self._spelling)
        self.eos_text = self._spelling.get(self.eos_id, "") if self.eos_id is not None else ""
        self.control_texts = _any_of(self._control)
        template = [self._template]
        settings = [self._control, self._add_bos, self.eos_id]
        self.identity = _sha256(model, template + settings)
        self.vocabulary_identity = _sha256(model, settings)
        self.encoding_identity = _sha256(model, settings[:-1])
        self.template_identity = _sha256(b"", template)

    @classmethod
    def from_file(cls, path: Path, chat_template: str | None) -> "SentencePieceTokenizer":
        """Read a model and, if it exists, the `tokenizer_config.json` in its directory.

        Raises:
            DataError: one of them is damaged.
        """
        config_path = path.with_name("tokenizer_config.json")
        try:
            config = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
        except ValueError as error:
            raise DataError.at(str(config_path), f"not JSON: {error}") from None
        try:
            return cls(path.read_bytes(), chat_template, config)
        except (RuntimeError, OSError) as error:
            raise DataError.at(str(path), f"not a sentencepiece model: {error}") from None

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        """See `HfTokenizer.render`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        ids = {"bos_token": self._processor.bos_id(), "eos_token": self.eos_id}
        special = {name: self._spelling.get(token_id, "") for name, token_id in ids.items()}
        rendered, _ = render_jinja_template(
            [messages],
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            **{**special, **kwargs},
        )
        return str(rendered[0])

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """See `HfTokenizer.encode`; `special_tokens` adds BOS if the model has one."""
        bos = [self._processor.bos_id()] if special_tokens and self._add_bos else []
        return [bos + self._encode_one(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """See `HfTokenizer.decode`."""
        text = ""
        for is_control, run in groupby(map(int, tokens), self._spelling.__contains__):
            if is_control:
                text += "".join(self._spelling[token] for token in run)
            else:
                text += self._processor.decode(list(run))
        return text

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._model)

    @cached_property
    def _split(self) -> re.Pattern[str]:
        longest_first = sorted(self._control, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def _encode_one(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in self._split.split(text) if self._control else [text]:
            if piece in self._control:
                tokens.append(self._control[piece])
            elif piece:
                tokens += self._processor.encode(piece)
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the C++ object, which is rebuilt from the model's bytes."""
        return {name: value for name, value in vars(self).items() if name != "_processor"}


def load_tokenizer(path: str, chat_template: str | None = None) -> Tokenizer:
    """Load a tokenizer.

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

        if not (Path(path).is_dir() or _HUB_NAME.fullmatch(path)):
            remedy = "name a model directory, or a hub model such as organization/model"
            raise DataError.at(path, "is not a directory", remedy)
        try:
            loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # The exception depends on which file of the tokenizer is invalid.
        except Exception as error:
            message = f"no tokenizer can be loaded: {library_reason(error)}"
            remedy = "name a model's directory or hub name"
            raise DataError.at(path, message, remedy) from error
        if template is not None:
            loaded.chat_template = template
        tokenizer = HfTokenizer(loaded)
    if tokenizer.has_chat_template:
        _check_syntax(tokenizer, path if template is None else "data.chat_template")
    return tokenizer


def _bare_model(path: Path) -> Path | None:
    """The sentencepiece file to use, if there is no `tokenizer.json`."""
    if path.suffix == ".model":
        if not path.is_file():
            raise DataError.at(str(path), "no such file", "check the tokenizer's path")
        return path
    model = path / "tokenizer.model"
    return model if model.is_file() and not (path / "tokenizer.json").exists() else None


def read_template(value: str | None) -> str | None:
    """The template: a value with a brace is a template, any other names a file."""
    if value is None or "{" in value:
        return value
    location, message = "data.chat_template", f"cannot read '{value}'"
    remedy = "name a file with a Jinja template, or write the template"
    try:
        with DataError.on_os_error(location, message, remedy):
            # A byte order mark would stand before every conversation.
            return Path(value).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError.at(location, f"{message}: {error}", "save it as UTF-8") from None


def _check_syntax(tokenizer: Tokenizer, location: str) -> None:
    """Check the template before rows are read, whose errors would name the rows instead."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        reason = f"the chat template has a syntax error in line {error.lineno}: {error.message}"
        raise DataError.at(location, reason, "correct it or set data.chat_template") from None
    # A template may refuse this conversation and still render those of the data.
    except Exception:
        return


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, filter(None, texts))) or "(?!)")


def _backend_json(backend: Any) -> str:
    """Everything that affects the tokens of a text, without padding and truncation of batches."""
    settings = json.loads(backend.to_str())
    relevant = settings.keys() - {"padding", "truncation"}
    return json.dumps({name: settings[name] for name in sorted(relevant)})


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(model: bytes, settings: list[Any]) -> str:
    return hashlib.sha256(model + json.dumps(settings).encode()).hexdigest()
