"""The judge's instructions: a Jinja file with what it is told, and how its verdict is read.

A template has a block `user`, may have a block `system`, and may set `verdict` (the pattern of the
last line of an answer) and `opening` (what stands before the letter, for a local language model);
the one that comes with the package, `templates/pairwise.jinja`, tells all that in its head.

Templates run in Jinja's sandbox, and an undefined variable is an error: instructions come from
elsewhere, and half of a question is worse than none.
"""

import hashlib
import json
import re
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

PLACE = "judge.template"
PACKAGED = "pairwise.jinja"
DEFAULT_VERDICT = r"(?i:[\s*_`#]*verdict\s*:[\s*_`]*(?:(?P<a>A)|(?P<b>B)|(?P<tie>tie))[\s*_`.]*)"
"""`Verdict: A` as a line of its own, whatever Markdown around it."""

DEFAULT_OPENING = "Verdict: "
_REMEDY = "correct it; templates/pairwise.jinja in the package shows what a template is made of"


@dataclass(frozen=True, slots=True)
class Chat:
    """What a judge is told."""

    system: str
    """May be empty."""

    user: str

    def messages(self) -> list[dict[str, Any]]:
        """As an endpoint or a chat template wants them."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        return [*found, {"role": "user", "content": self.user}]


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """Instructions that have been tried once."""

    name: str
    digest: str
    """sha256 of the text."""

    opening: str
    _template: Template
    _pattern: re.Pattern[str]

    @classmethod
    def load(cls, path: str | None) -> Self:
        """Read a template and render it for two sample answers.

        Args:
            path: None: the packaged one.

        Raises:
            ConfigError: there is none, or it does not work.
        """
        try:
            if path is None:
                text = (files(__package__) / PACKAGED).read_text("utf-8")
            else:
                text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            remedy = "name a Jinja file, or leave it out for the packaged one"
            raise ConfigError.at(PLACE, f"cannot read {path}: {error}", remedy) from None
        environment = SandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            template = environment.from_string(text)
        except TemplateSyntaxError as error:
            reason = f"{path} has a syntax error in line {error.lineno}: {error.message}"
            raise ConfigError.at(PLACE, reason, _REMEDY) from None
        if "user" not in template.blocks:
            raise ConfigError.at(PLACE, f"{path} has no block `user`", _REMEDY)
        context = _context(template, _values("prompt", "first", "second"))
        pattern = _pattern(str(context.vars.get("verdict", DEFAULT_VERDICT)).strip())
        name = PACKAGED if path is None else Path(path).name
        opening = str(context.vars.get("opening", DEFAULT_OPENING))
        digest = hashlib.sha256(text.encode()).hexdigest()
        loaded = cls(name, digest, opening, template, pattern)
        loaded.chat("prompt", "first", "second")
        return loaded

    def chat(self, prompt: Prompt, answer_a: str, answer_b: str) -> Chat:
        """What the judge is told about two answers, the one shown first being A.

        Raises:
            ConfigError: the template fails on them.
        """
        values = _values(prompt, answer_a, answer_b)
        context = _context(self._template, values)
        return Chat(*(_block(self._template, context, name) for name in ("system", "user")))

    def letter(self, text: str) -> Letter | None:
        """The verdict that an answer of the judge ends with; None where it has none."""
        lines = [line for line in text.splitlines() if line.strip()]
        found = self._pattern.fullmatch(lines[-1].strip()) if lines else None
        if found is None:
            return None
        groups = found.groupdict()
        letters: tuple[tuple[str, Letter], ...] = (("a", "A"), ("b", "B"), ("tie", "tie"))
        said = [letter for group, letter in letters if groups.get(group) is not None]
        return said[0] if len(said) == 1 else None


def _values(prompt: Prompt, answer_a: str, answer_b: str) -> dict[str, Any]:
    """What a template may use."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [_prompt_text(prompt), answer_a, answer_b]
    # A hash of what it fences: nobody can write an answer that has its own hash in it.
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    # Half a surrogate pair is no text that could be sent.
    shown, first, second = (text.encode("utf-8", "replace").decode() for text in texts)
    return {
        "prompt": shown,
        "messages": messages,
        "answer_a": first,
        "answer_b": second,
        "fence": digest[:16],
    }


def _prompt_text(prompt: Prompt) -> str:
    """A prompt for reading; a conversation turn by turn, a single question by itself."""
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


def _context(template: Template, values: dict[str, Any]) -> Context:
    """The template's own variables, beside those that it is given."""
    context = template.new_context(values)
    try:
        for _ in template.root_render_func(context):
            pass
    except Exception as error:  # a template may fail in any way
        raise _failed(error) from None
    return context


def _block(template: Template, context: Context, name: str) -> str:
    block = template.blocks.get(name)
    if block is None:
        return ""
    try:
        return "".join(block(context)).strip()
    except Exception as error:  # likewise
        raise _failed(error) from None


def _failed(error: Exception) -> ConfigError:
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return ConfigError.at(PLACE, f"cannot be rendered: {kind}{error}", _REMEDY)


def _pattern(text: str) -> re.Pattern[str]:
    """The pattern of a verdict.

    Raises:
        ConfigError: it is none.
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        message = f"sets `verdict` to {text!r}, which is no regular expression: {error}"
        raise ConfigError.at(PLACE, message, _REMEDY) from None
    if missing := {"a", "b"} - pattern.groupindex.keys():
        message = f"sets `verdict` to {text!r} without a group {' and '.join(sorted(missing))}"
        raise ConfigError.at(PLACE, message, "name its groups: (?P<a>A), (?P<b>B), (?P<tie>tie)")
    return pattern
