"""What comes back from an endpoint: a reply, or trouble, and of which sort.

Not here: what is done about it (`judge_api.py`).
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.judge.endpoint import Endpoint
from megatron_idpo.evaluate.judge.pace import retry_after_s

if TYPE_CHECKING:
    from openai import OpenAIError

_REASON_CHARACTERS = 300
_OPTIONS = ("max_tokens", "temperature")
_PASSING = (408, 409, 425)
"""Statuses below 500 that another attempt may not meet."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The judge's words."""

    text: str
    input_tokens: int
    output_tokens: int
    why_silent: str = ""
    """What, other than the judge, may have kept a verdict out of it."""

    is_cut: bool = False
    """Whether the room for it was too small, which at a temperature of 0 it will be again."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """A request that had no reply."""

    reason: str
    may_pass: bool = True
    is_limit: bool = False
    wait_s: float | None = None
    """How long the endpoint wants to be left alone."""

    refused_option: str = ""
    """The option of the request that the model does not take."""


def reply_of(body: str, endpoint: Endpoint) -> Reply | Trouble:
    """Read the body of a successful response."""
    try:
        values = json.loads(body)
        choice = values["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = endpoint.scrubbed(_text(message.get("content")))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        start = endpoint.scrubbed(body)[:_REASON_CHARACTERS]
        return Trouble(f"the response is no chat completion: {start!r}")
    usage = values.get("usage")
    silent = ""
    if finish == "length":
        silent = "the judge's answer was cut off: raise judge.max_tokens"
    elif finish == "content_filter" or message.get("refusal"):
        silent = "the endpoint refuses to answer this question"
    return Reply(
        text,
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        silent,
        is_cut=finish == "length",
    )


def trouble_of(
    error: "OpenAIError", settings: JudgeConfig, endpoint: Endpoint, now_s: float
) -> Trouble:
    """What an error of the library means.

    Args:
        error: it.
        settings: of the judge.
        endpoint: that was asked.
        now_s: seconds of the Unix epoch.

    Raises:
        ConfigError: no request will ever succeed.
    """
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        return _of_status(error.status_code, error, settings, endpoint, now_s)
    if isinstance(error, APIConnectionError):
        cause = error.__cause__ or error
        message = f"no connection ({type(cause).__name__}: {cause})"
        return Trouble(_short(message, endpoint))
    return Trouble(_short(f"{type(error).__name__}: {error}", endpoint))


def _of_status(
    status: int, error: Any, settings: JudgeConfig, endpoint: Endpoint, now_s: float
) -> Trouble:
    """What a status says."""
    reason = _short(f"status {status}: {_message(error)}", endpoint)
    wait_s = retry_after_s(error.response.headers.get("retry-after"), now_s)
    if status == 401:
        # Not in the endpoint's words, which may quote parts of the key.
        message = f"{endpoint.url} refuses the key in {settings.key_variable} (status 401)"
        raise ConfigError.at("judge.key_variable", message, "export the right key")
    if status in (402, 403) or (status == 429 and error.code == "insufficient_quota"):
        message = f"{endpoint.url} refuses to serve {settings.model} ({reason})"
        raise ConfigError.at("judge.model", message, "see what your account there may do")
    if status in (404, 405, 410):
        message = f"{endpoint.url} does not serve {settings.model} ({reason})"
        raise ConfigError.at("judge.model", message, "correct the name, or judge.base_url")
    if status == 429:
        return Trouble(reason, is_limit=True, wait_s=wait_s)
    if status == 400 and error.param in _OPTIONS and str(error.code).startswith("unsupported_"):
        return Trouble(reason, may_pass=False, refused_option=error.param)
    return Trouble(reason, may_pass=status >= 500 or status in _PASSING, wait_s=wait_s)


def _text(content: Any) -> str:
    """What an answer says; of one in parts those that are text, not the judge's thoughts."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(text for part in parts if isinstance(text := part.get("text"), str))
    return content if isinstance(content, str) else ""


def _message(error: Any) -> str:
    """The endpoint's own words."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return str(error.message)


def _short(text: str, endpoint: Endpoint) -> str:
    """Without the key, on one line, and no page of HTML."""
    return " ".join(endpoint.scrubbed(text).split())[:_REASON_CHARACTERS]


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else 0
