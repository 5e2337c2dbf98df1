"""Reads one record and shows what of it is trained."""

import json
from dataclasses import dataclass
from typing import Any

from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.tokenize.build_store import tokenize_rows
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer

TEXT = "{{ m.content or '' }}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(content: str = TEXT, opened: str = OPEN) -> str:
    """A ChatML template that writes each message's content in this way."""
    header = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    return header + content + "<|im_end|>\n{% endfor %}" + opened


def calling(arguments: str) -> str:
    """One that writes tool calls as `[name arguments]`, the arguments in this way."""
    call = "[{{ c.function.name }} " + arguments + "]"
    return chatml(TEXT + "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}")


CHATML = chatml()
ENCODES = calling("{{ c.function.arguments | tojson }}")
CONCATENATES = calling("{{ '' + c.function.arguments }}")
WRITES_AS_IS = calling("{{ c.function.arguments }}")
LISTS = calling("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}")


@dataclass
class Trained:
    """What one record becomes: texts, without ChatML's control tokens, and notes."""

    prompt: str
    chosen: str
    rejected: str
    notes: dict[str, str]


class RefusedError(Exception):
    """A bad row: its reason and its remedy."""


class RecordReader:
    """Reads and tokenizes one record; `RefusedError` if it is a bad row."""

    def __init__(self, tokenizer_path: str) -> None:
        self._path = tokenizer_path
        self._tokenizers: dict[str, Tokenizer] = {}

    def __call__(
        self,
        record: Any,
        format: Any = "auto",
        template: str = CHATML,
        columns: dict[str, str] | None = None,
    ) -> Trained:
        if template not in self._tokenizers:
            self._tokenizers[template] = load_tokenizer(self._path, template)
        tokenizer, row = self._tokenizers[template], RawRow(1, record, columns or {})
        batch = tokenize_rows(tokenizer, TokenOptions(format=format), (0, [row]))
        for bad in batch.bad_rows:
            raise RefusedError(f"{bad.reason}; {bad.remedy}")
        [pair] = batch.pairs.to_pylist()
        texts = (tokenizer.decode(pair[name]) for name in ("prompt", "chosen", "rejected"))
        notes = {kind: note.detail for kind, note in batch.report.notes.items()}
        expected = ("tokens merged", "untemplated")  # By a small tokenizer; of text.
        return Trained(*map(plain, texts), {k: v for k, v in notes.items() if k not in expected})


def plain(text: str) -> str:
    """ChatML as `<user>hi</><assistant>`, plain text without BOS and EOS."""
    for role in ("system", "user", "assistant", "tool"):
        text = text.replace(f"<|im_start|>{role}\n", f"<{role}>")
    return text.replace("<|im_end|>\n", "</>").removeprefix("<s>").removesuffix("</s>")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def calls(arguments: Any, text: str | None = None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return assistant(text, tool_calls=[{"type": "function", "function": function}])


ANSWERS = {"chosen": "le chat", "rejected": "la chat"}
MESSAGES = {"chosen": [assistant("le chat")], "rejected": [assistant("la chat")]}
CHAT = {"prompt": [user("the cat")], **MESSAGES}
ONE_TURN = ("<user>the cat</><assistant>", "le chat</>", "la chat</>")


CITY = {"city": "Örebro"}
JSON_CITY = json.dumps(CITY, ensure_ascii=False)
