"""The judge's instructions: a Jinja template, and how the judge's verdict is read.

A template has a block `user`, and may have a block `system`. The header of the packaged template,
`pairwise.jinja`, documents its variables. Templates come from users: they run in Jinja's sandbox.
An undefined variable is an error, so that no question is asked with a part missing.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from jinja2 import StrictUndefined, Template, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.answers import Prompt

type Letter = Literal["A", "B", "tie"]

LOCATION = "judge.template"
PACKAGED = "pairwise.jinja"

OPENING = "Verdict: "
"""Text before the letter."""

_VERDICT = re.compile(r"(?i)[\s*_`#]*verdict\s*:[\s*_`]*(A|B|tie)[\s*_`.]*")
"""The last line of a reply, with or without Markdown around it."""

_LETTERS: dict[str, Letter] = {"a": "A", "b": "B", "tie": "tie"}
_REMEDY = "correct it; megatron_idpo/evaluate/judge/pairwise.jinja is an example"


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """A template that has been loaded and rendered once."""

    name: str
    digest: str
    """sha256 of the text."""

    _template: Template

    @classmethod
    def load(cls, path: str | None) -> Self:
        """Reads a template, and renders it for two sample answers.

        Args:
            path: of the file; None for the packaged template.

        Raises:
            ConfigError: it cannot be read or rendered.
        """
        file = files(__package__) / PACKAGED if path is None else Path(path)
        remedy = "name a Jinja file, or leave it out for the packaged template"
        try:
            with ConfigError.on_os_error(LOCATION, f"cannot read {path}", remedy):
                text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError.at(LOCATION, f"cannot read {path}: {error}", remedy) from None
        environment = SandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        with _reported_errors():
            template = environment.from_string(text)
        if "user" not in template.blocks:
            raise ConfigError.at(LOCATION, f"{path} has no block `user`", _REMEDY)
        loaded = cls(file.name, hashlib.sha256(text.encode()).hexdigest(), template)
        loaded.messages("prompt", "first", "second")
        return loaded

    def messages(self, prompt: Prompt, answer_a: str, answer_b: str) -> list[dict[str, str]]:
        """The chat messages about two answers, A being shown first.

        Raises:
            ConfigError: the template fails on them.
        """
        context = self._template.new_context(_variables(prompt, answer_a, answer_b))
        messages = []
        with _reported_errors():
            list(self._template.root_render_func(context))  # `set` and `macro` outside of blocks
            for role in ("system", "user"):
                if block := self._template.blocks.get(role):
                    messages.append({"role": role, "content": "".join(block(context)).strip()})
        return messages


def verdict_letter(reply: str) -> Letter | None:
    """The verdict in the last line of a judge's reply; None if there is none."""
    match = _VERDICT.fullmatch(reply.strip().split("\n")[-1])
    return None if match is None else _LETTERS[match[1].lower()]


def _variables(prompt: Prompt, answer_a: str, answer_b: str) -> dict[str, Any]:
    """The variables of a template."""
    texts = [_prompt_text(prompt), answer_a, answer_b]
    # The fence is a hash of the texts that it separates, so that no answer can contain its own
    # fence and thereby imitate the rest of the question.
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    # "replace": a lone surrogate cannot be sent.
    shown, first, second = (text.encode("utf-8", "replace").decode() for text in texts)
    return {"prompt": shown, "answer_a": first, "answer_b": second, "fence": digest[:16]}


def _prompt_text(prompt: Prompt) -> str:
    """A prompt as text: a single user message as it is, a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return str(prompt[0].get("content"))
    return "\n\n".join(f"[{turn.get('role')}]\n{turn.get('content') or ''}" for turn in prompt)


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Turns any error of a template into a `ConfigError`."""
    try:
        yield
    except Exception as error:  # a template can raise anything, `1 // 0` for example
        line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        message = f"cannot be rendered{line}: {type(error).__name__}: {error}"
        raise ConfigError.at(LOCATION, message, _REMEDY) from None
