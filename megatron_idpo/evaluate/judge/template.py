"""The judge's instructions: a Jinja template, and how the judge's verdict is read.

A template has a block `user`, may have a block `system`, and may set `verdict` (a pattern for the
last line of a reply) and `opening` (text before the letter, for a local language model). The header
of the packaged template, `pairwise.jinja`, documents all of this.

Templates come from users: they run in Jinja's sandbox. An undefined variable is an error, so that
no question is asked with a part missing.
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

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.answers import Prompt

type Letter = Literal["A", "B", "tie"]

LOCATION = "judge.template"
PACKAGED = "pairwise.jinja"
DEFAULT_VERDICT = r"(?i:[\s*_`#]*verdict\s*:[\s*_`]*(?:(?P<a>A)|(?P<b>B)|(?P<tie>tie))[\s*_`.]*)"
"""A line `Verdict: A`, with or without Markdown around it."""

DEFAULT_OPENING = "Verdict: "
_REMEDY = "correct it; megatron_idpo/evaluate/judge/pairwise.jinja is an example"


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages that a judge is given."""

    system: str
    """May be empty."""

    user: str

    def messages(self) -> list[dict[str, Any]]:
        """In the format of chat endpoints and chat templates."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """A template that has been loaded and rendered once."""

    name: str
    digest: str
    """sha256 of the text."""

    opening: str
    _template: Template
    _pattern: re.Pattern[str]

    @classmethod
    def load(cls, path: str | None) -> Self:
        """Reads a template, and renders it for two sample answers.

        Args:
            path: of the file; None for the packaged template.

        Raises:
            ConfigError: it cannot be read or rendered.
        """
        file = files(__package__) / PACKAGED if path is None else Path(path)
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            remedy = "name a Jinja file, or leave it out for the packaged template"
            raise ConfigError.at(LOCATION, f"cannot read {path}: {error}", remedy) from None
        environment = SandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            template = environment.from_string(text)
        except TemplateSyntaxError as error:
            message = f"{path} has a syntax error in line {error.lineno}: {error.message}"
            raise ConfigError.at(LOCATION, message, _REMEDY) from None
        if "user" not in template.blocks:
            raise ConfigError.at(LOCATION, f"{path} has no block `user`", _REMEDY)
        settings = _context(template, _variables("prompt", "first", "second")).vars
        loaded = cls(
            file.name,
            hashlib.sha256(text.encode()).hexdigest(),
            str(settings.get("opening", DEFAULT_OPENING)),
            template,
            _verdict_pattern(str(settings.get("verdict", DEFAULT_VERDICT)).strip()),
        )
        loaded.chat("prompt", "first", "second")
        return loaded

    def chat(self, prompt: Prompt, answer_a: str, answer_b: str) -> Chat:
        """The messages about two answers, A being shown first.

        Raises:
            ConfigError: the template fails on them.
        """
        context = _context(self._template, _variables(prompt, answer_a, answer_b))
        texts = []
        for name in ("system", "user"):
            block = self._template.blocks.get(name)
            with _reported_errors():
                texts.append("" if block is None else "".join(block(context)).strip())
        return Chat(*texts)

    def letter(self, text: str) -> Letter | None:
        """The verdict in the last line of a reply; None if there is none."""
        lines = [line for line in text.splitlines() if line.strip()]
        match = self._pattern.fullmatch(lines[-1].strip()) if lines else None
        if match is None:
            return None
        letters: dict[str, Letter] = {"a": "A", "b": "B", "tie": "tie"}
        groups = match.groupdict()
        matched = [letter for name, letter in letters.items() if groups.get(name) is not None]
        return matched[0] if len(matched) == 1 else None


def _variables(prompt: Prompt, answer_a: str, answer_b: str) -> dict[str, Any]:
    """The variables of a template."""
    texts = [_prompt_text(prompt), answer_a, answer_b]
    # The fence is a hash of the texts that it separates, so that no answer can contain its own
    # fence and thereby imitate the rest of the question.
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    # "replace": a lone surrogate cannot be sent.
    shown, first, second = (text.encode("utf-8", "replace").decode() for text in texts)
    return {
        "prompt": shown,
        "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "answer_a": first,
        "answer_b": second,
        "fence": digest[:16],
    }


def _prompt_text(prompt: Prompt) -> str:
    """A prompt as text: a single user message as it is, a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    contents = [
        content if isinstance(content := turn.get("content"), str) else json.dumps(content)
        for turn in prompt
    ]
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return contents[0]
    return "\n\n".join(
        f"[{turn.get('role')}]\n{content}" for turn, content in zip(prompt, contents, strict=True)
    )


def _context(template: Template, variables: dict[str, Any]) -> Context:
    """The context for the blocks, with the variables that the template itself sets."""
    context = template.new_context(variables)
    with _reported_errors():
        for _ in template.root_render_func(context):
            pass
    return context


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Turns any error of a template into a `ConfigError`."""
    try:
        yield
    except Exception as error:  # a template can raise anything, `1 // 0` for example
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ConfigError.at(LOCATION, f"cannot be rendered: {kind}{error}", _REMEDY) from None


def _verdict_pattern(text: str) -> re.Pattern[str]:
    """Compiles the pattern of a verdict.

    Raises:
        ConfigError: it is not a regular expression, or lacks a group.
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        message = f"`verdict` {text!r} is not a regular expression: {error}"
        raise ConfigError.at(LOCATION, message, _REMEDY) from None
    if missing := {"a", "b"} - pattern.groupindex.keys():
        message = f"`verdict` {text!r} has no group {' and '.join(sorted(missing))}"
        raise ConfigError.at(LOCATION, message, "name its groups: (?P<a>A), (?P<b>B), (?P<tie>tie)")
    return pattern
