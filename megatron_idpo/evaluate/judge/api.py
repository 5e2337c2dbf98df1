"""A judge behind an OpenAI-compatible endpoint, asked with several requests at once.

The openai client does the transport: it retries lost connections, timeouts and statuses 408, 409,
429 and 5xx with growing pauses and obeys `Retry-After` (see its `max_retries`). This module adds

- a rate limit over all requests, retries included,
- another request where a reply contains no verdict,
- an early stop, at a permanent error (wrong key, unknown model) or after too many failures in a
  row, so that no further requests are paid for.

`judge.max_attempts` bounds all requests of a question, for any reason of repeating them.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.evaluate.judge.comparison import Question
from megatron_idpo.evaluate.judge.endpoint import Endpoint
from megatron_idpo.evaluate.judge.template import JudgeTemplate, Letter, verdict_letter
from megatron_idpo.evaluate.judge.verdicts import Verdict

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 10
"""Consecutive questions without a verdict after which judging stops."""

_MAX_REASON_CHARACTERS = 300
_RETRIED_STATUSES = (408, 409, 429)
"""Statuses below 500 that the openai client retries."""


class ApiJudge:
    """Asks questions over the network."""

    def __init__(self, settings: JudgeConfig, endpoint: Endpoint, template: JudgeTemplate) -> None:
        """Prepares; the first request is sent by `ask`."""
        self._settings = settings
        self._endpoint = endpoint
        self._template = template
        self._limiter = RateLimiter(settings.requests_per_minute)
        self._failures_in_a_row = 0
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_tokens}
        """Request fields that some models reject; `_drop_option` adapts them."""

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """See `Judge.ask`."""
        asyncio.run(self._ask(questions, done))

    async def _ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        remaining = iter(questions)
        async with self._client() as client:

            async def work() -> None:
                for question in remaining:
                    verdict, is_permanent_error = await self._verdict(client, question)
                    done(verdict)
                    # Rejected requests cost nothing, and a question that failed in an earlier run
                    # is known to be bad: neither says that the endpoint is unusable.
                    if not (is_permanent_error or question.has_failed):
                        self._check_failures(verdict)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._settings.max_parallel, len(questions))):
                        group.create_task(work())
            except ExceptionGroup as errors:
                # Several workers may fail for the same reason at once; report it once.
                if all(isinstance(error, UserError) for error in errors.exceptions):
                    raise errors.exceptions[0] from None
                raise

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        http_client = DefaultAsyncHttpxClient(
            trust_env=not self._endpoint.is_local,  # no proxy leads to this machine
            event_hooks={"request": [self._limiter.wait]},  # also called for the client's retries
        )
        return AsyncOpenAI(
            api_key=self._endpoint.key,
            base_url=self._endpoint.url,
            timeout=self._settings.timeout_s,
            http_client=http_client,
        )

    async def _verdict(self, client: "AsyncOpenAI", question: Question) -> tuple[Verdict, bool]:
        """Asks one question until it has a verdict or its attempts are used up.

        Returns:
            The verdict, and whether the endpoint rejects this question (too long, for example).

        Raises:
            ConfigError: the endpoint rejects every question.
        """
        from openai import APIError

        messages = self._template.messages(question.prompt, *question.shown)
        attempts = input_tokens = output_tokens = 0
        text = note = ""
        letter: Letter | None = None
        is_rejected = False
        while letter is None and attempts < self._settings.max_attempts:
            try:
                retries = self._settings.max_attempts - attempts - 1
                reply, requests = await self._request(client, messages, retries)
            except APIError as error:
                check_endpoint_error(error, self._settings, self._endpoint)
                attempts += 1 + int(error.request.headers.get("x-stainless-retry-count", 0))
                note = error_reason(error, self._settings, self._endpoint)
                is_rejected = is_permanent_error(error)
                break
            attempts += requests
            input_tokens += reply.input_tokens
            output_tokens += reply.output_tokens
            text, letter = reply.text, verdict_letter(reply.text)
            note = "" if letter else reply.no_verdict_reason
            if reply.is_cut:
                break  # at temperature 0 it would be cut off again
        verdict = question.verdict(
            letter,
            note=note,
            text=text,
            attempts=attempts,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        return verdict, is_rejected

    async def _request(
        self, client: "AsyncOpenAI", messages: Any, max_retries: int
    ) -> tuple["Reply", int]:
        """The reply to one question, and how many requests it took."""
        from openai import BadRequestError

        completions = client.with_options(max_retries=max_retries).chat.completions
        while True:
            options = dict(self._options)  # another worker may change them meanwhile
            try:
                raw = await completions.with_raw_response.create(
                    model=self._settings.model, messages=messages, **options
                )
            except BadRequestError as error:
                if not str(error.code).startswith("unsupported_") or error.param not in options:
                    raise
                self._drop_option(error.param)
            else:
                return parse_reply(raw.http_response.text, self._endpoint), 1 + raw.retries_taken

    def _drop_option(self, option: str) -> None:
        """Adapts to reasoning models, which reject `max_tokens` and any set temperature."""
        value = self._options.pop(option, None)  # None: another worker was first
        if option == "max_tokens" and value is not None:
            self._options["max_completion_tokens"] = value
        elif value is not None:
            logger.warning("%s rejects temperature 0; it samples", self._settings.model)

    def _check_failures(self, verdict: Verdict) -> None:
        """Stops where question after question has no verdict.

        Raises:
            ConfigError: `MAX_FAILURES_IN_A_ROW` questions in a row have none.
        """
        self._failures_in_a_row = self._failures_in_a_row + 1 if verdict.verdict is None else 0
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            message = (
                f"{MAX_FAILURES_IN_A_ROW} questions in a row got no verdict from "
                f"{self._settings.model} at {self._endpoint.url}; last reason: {verdict.note}"
            )
            remedy = "fix this and run the same command again; verdicts so far are kept"
            raise ConfigError.at("judge", message, remedy)


class RateLimiter:
    """Spaces requests evenly in time; shared by all workers."""

    def __init__(
        self,
        requests_per_minute: int | None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: the limit, None for none; functions that tests replace."""
        self._interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._sleep = sleep
        self._clock = clock
        self._next_s = clock()

    async def wait(self, *_: Any) -> None:
        """Returns when the next request may be sent. httpx passes the request to its hooks."""
        now_s = self._clock()
        send_s = max(now_s, self._next_s)
        # Reserve the slot before sleeping: other workers call this in the meantime.
        self._next_s = send_s + self._interval_s
        if send_s > now_s:
            await self._sleep(send_s - now_s)


# ---- replies and errors ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """The content of a successful response."""

    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    no_verdict_reason: str = "the judge's answer does not end with a verdict"
    """Why there is no verdict in the text, if there is none."""

    is_cut: bool = False
    """Whether it was cut off at the token limit."""


def parse_reply(body: str, endpoint: Endpoint) -> Reply:
    """Parses the body of a successful response; endpoints differ in what they send."""
    try:
        values = json.loads(body)
        choice = values["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = endpoint.redact(message.get("content") or "")
        usage = values.get("usage") or {}
        inputs = int(usage.get("prompt_tokens") or 0)
        outputs = int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        start = endpoint.redact(body)[:_MAX_REASON_CHARACTERS]
        return Reply(no_verdict_reason=f"the response is not a chat completion: {start!r}")
    if finish == "length":
        reason = "the judge's answer was cut off; raise judge.max_tokens"
        return Reply(text, inputs, outputs, reason, is_cut=True)
    if finish == "content_filter" or message.get("refusal"):
        return Reply(text, inputs, outputs, "the endpoint refuses to answer this question")
    return Reply(text, inputs, outputs)


def is_permanent_error(error: "APIError") -> bool:
    """Whether another request of the same question would fail again."""
    status = getattr(error, "status_code", None)
    return status is not None and status < 500 and status not in _RETRIED_STATUSES


def check_endpoint_error(error: "APIError", settings: JudgeConfig, endpoint: Endpoint) -> None:
    """Stops at errors that every request would meet.

    Raises:
        ConfigError: the key, the model or the address is wrong, or the account has no quota.
    """
    status = getattr(error, "status_code", None)
    reason = error_reason(error, settings, endpoint)
    if status == 401:
        # Not in the words of the endpoint, which may quote parts of the key.
        message = f"{endpoint.url} rejects the key in {settings.key_variable} (status 401)"
        raise ConfigError.at("judge.key_variable", message, "export a valid key")
    has_no_quota = status == 429 and error.code == "insufficient_quota"
    if has_no_quota or status in (402, 403, 404, 405, 410):
        message = f"{endpoint.url} does not serve {settings.model} ({reason})"
        remedy = "correct the name or judge.base_url, or check your account's permissions"
        raise ConfigError.at("judge.model", message, remedy)


def error_reason(error: "APIError", settings: JudgeConfig, endpoint: Endpoint) -> str:
    """One line about an error, without the key."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, APITimeoutError):
        return f"no answer within {settings.timeout_s:g} s"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, APIConnectionError):
        cause = error.__cause__ or error
        text = f"no connection ({type(cause).__name__}: {cause})"
    elif isinstance(error, APIStatusError):
        message = error.body.get("message") if isinstance(error.body, dict) else None
        text = f"status {error.status_code}: {message or error.message}"
    return " ".join(endpoint.redact(text).split())[:_MAX_REASON_CHARACTERS]
