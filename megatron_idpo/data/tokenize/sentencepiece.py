"""Sentencepiece `.model` files, read by the sentencepiece library itself.

The library does not find control tokens in text, and chat templates write them into text. So text
is split at their spellings, and each stretch between is encoded alone, with the model's own dummy
prefix as Meta's reference code does for Llama 2. A `tokenizer_config.json` beside the model may
give BOS/EOS rules, a chat template and added tokens.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_idpo.errors import DataError


class SentencePieceTokenizer:
    """A `Tokenizer` (see `tokenizers.py`) around one sentencepiece model."""

    def __init__(
        self,
        model: bytes,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Args: the file's bytes; a Jinja template; what `tokenizer_config.json` says."""
        config = config or {}
        self._model = model
        self._template = chat_template or config.get("chat_template")
        processor = self._processor
        pieces = range(processor.get_piece_size())
        self._control = {processor.id_to_piece(i): i for i in pieces if processor.is_control(i)}
        for number, token in config.get("added_tokens_decoder", {}).items():
            if int(number) != processor.unk_id():
                self._control[token["content"]] = int(number)
        self._spelling = {number: text for text, number in self._control.items()}
        self._add_bos = bool(config.get("add_bos_token", True)) and processor.bos_id() >= 0
        self.has_chat_template = self._template is not None
        self.eos_id: int | None = processor.eos_id() if processor.eos_id() >= 0 else None
        eos = config.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if eos in self._control:
            self.eos_id = self._control[eos]
        self.eos_text: str | None = None if self.eos_id is None else self._spelling[self.eos_id]
        self.special_ids = frozenset(self._spelling)
        self.vocab_size = max(len(pieces), *(number + 1 for number in self._spelling), 1)
        template = [self._template]
        settings = [self._control, self._add_bos, self.eos_id]
        self.identity = _digest(model, template + settings)
        self.vocabulary_identity = _digest(model, settings)
        self.template_identity = _digest(b"", template)

    @classmethod
    def from_file(cls, path: Path, chat_template: str | None) -> "SentencePieceTokenizer":
        """Reads a model and the `tokenizer_config.json` beside it.

        Raises:
            DataError: one of them is damaged.
        """
        beside = path.with_name("tokenizer_config.json")
        try:
            config = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
        except ValueError as error:
            raise DataError.at(str(beside), f"not JSON: {error}") from None
        try:
            return cls(path.read_bytes(), chat_template, config)
        except (RuntimeError, OSError) as error:
            raise DataError.at(str(path), f"not a sentencepiece model: {error}") from None

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> str:
        """The conversation as the chat template writes it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        bos = self._processor.bos_id()
        special = {"bos_token": self._spelling.get(bos, ""), "eos_token": self.eos_text or ""}
        rendered, _ = render_jinja_template(
            [messages],
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            **{**special, **kwargs},
        )
        return str(rendered[0])

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; with `special_tokens` after BOS, where the model has one."""
        bos = [self._processor.bos_id()] if special_tokens and self._add_bos else []
        return [bos + self._encode_one(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, control tokens spelled out."""
        text = ""
        stretch: list[int] = []
        for token in tokens:
            if token in self._spelling:
                text += self._processor.decode(stretch) + self._spelling[token]
                stretch = []
            else:
                stretch.append(int(token))
        return text + str(self._processor.decode(stretch))

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
        for stretch in self._split.split(text) if self._control else [text]:
            if stretch in self._control:
                tokens.append(self._control[stretch])
            elif stretch:
                tokens += self._processor.encode(stretch)
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the C++ object, which is made again from the model's bytes."""
        return {name: value for name, value in vars(self).items() if name != "_processor"}


def _digest(model: bytes, settings: list[Any]) -> str:
    return hashlib.sha256(model + json.dumps(settings).encode()).hexdigest()
