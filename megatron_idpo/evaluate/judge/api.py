"""A judge behind an OpenAI-compatible endpoint: many requests at once, each until it has a verdict.

What may pass (a server's error, a lost connection, no answer in time, an answer without a verdict)
uses up an attempt. A rate limit uses up none: it is waited out, by all requests together. A
question waits for an hour in all, at most. What will not pass (a wrong key, no such model) ends
everything at once, and so does a row of questions without any verdict: paying for the rest would be
of no use. Only questions that the endpoint cannot take (too long for it) cost nothing, and those
that failed in an earlier start are known to be bad.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.evaluate.judge.endpoint import Endpoint
from megatron_idpo.evaluate.judge.pace import Pace
from megatron_idpo.evaluate.judge.question import Question
from megatron_idpo.evaluate.judge.reply import Reply, Trouble, reply_of, trouble_of
from megatron_idpo.evaluate.judge.template import Chat, JudgeTemplate, Letter
from megatron_idpo.evaluate.judge.verdicts import Verdict

if TYPE_CHECKING:
    from openai import AsyncOpenAI

GIVE_UP_AFTER = 10
"""Questions in a row without a verdict."""

LONGEST_WAIT_S = 3600.0
"""Of a question; what takes longer is a quota, and somebody should know."""

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_TOLD_WAIT_S = 20.0


class ApiJudge:
    """Asks over the network."""

    def __init__(
        self,
        settings: JudgeConfig,
        endpoint: Endpoint,
        template: JudgeTemplate,
        say: Callable[[str], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Connect to nothing yet.

        Args:
            settings: of the judge.
            endpoint: where it is.
            template: what it is told.
            say: prints a line for the user.
            sleep: waits so many seconds.
        """
        self._settings = settings
        self._endpoint = endpoint
        self._template = template
        self._say = say
        self._sleep = sleep
        self._pace = Pace(settings.requests_per_minute, sleep=sleep)
        self._failed_in_a_row = 0
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_tokens}
        """What a request says beside model and messages."""

    def ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        """See `Judge.ask`."""
        asyncio.run(self._ask(questions, done))

    async def _ask(self, questions: Sequence[Question], done: Callable[[Verdict], None]) -> None:
        left = iter(questions)
        async with self._client() as client:

            async def work() -> None:
                for question in left:
                    verdict, is_hopeless = await self._verdict(client, question)
                    done(verdict)
                    if not (is_hopeless or question.has_failed):
                        self._notice(verdict)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._settings.max_parallel, len(questions))):
                        group.create_task(work())
            except ExceptionGroup as errors:
                # Several requests may fail for one reason at once, which is told once.
                if all(isinstance(error, UserError) for error in errors.exceptions):
                    raise errors.exceptions[0] from None
                raise

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        http = DefaultAsyncHttpxClient(trust_env=False) if self._endpoint.is_local else None
        return AsyncOpenAI(
            api_key=self._endpoint.key,
            base_url=self._endpoint.url,
            timeout=None,  # the whole of a request has its time below, not each part of it
            max_retries=0,  # attempts are counted here
            http_client=http,
        )

    async def _verdict(self, client: "AsyncOpenAI", question: Question) -> tuple[Verdict, bool]:
        """One question, until it has a verdict or its attempts are used up.

        Returns:
            Also whether its own text is what the endpoint does not take.
        """
        chat = self._template.chat(question.prompt, *question.shown)
        attempts = limits = 0
        waited_s = 0.0
        used = [0, 0]
        note = text = ""
        letter: Letter | None = None
        is_hopeless = False
        while letter is None and attempts < self._settings.max_attempts:
            await self._pace.turn()
            found = await self._request(client, chat)
            if isinstance(found, Reply):
                attempts += 1
                used = [used[0] + found.input_tokens, used[1] + found.output_tokens]
                text, letter = found.text, self._template.letter(found.text)
                note = self._answer_note(found, is_verdict=letter is not None)
                if found.is_cut and "temperature" in self._options:
                    break
                continue  # without a pause: the endpoint is well
            note, is_hopeless = found.reason, not found.may_pass
            limits, attempts = limits + found.is_limit, attempts + (not found.is_limit)
            if is_hopeless or attempts == self._settings.max_attempts:
                break
            wait_s = self._wait_s(found, (limits if found.is_limit else attempts) - 1)
            waited_s += wait_s
            if waited_s > LONGEST_WAIT_S:
                break
            if found.is_limit:
                self._pace.hold(wait_s)
            else:
                await self._sleep(wait_s)
        verdict = question.verdict(
            letter,
            note=note,
            text=text,
            attempts=attempts,
            input_tokens=used[0],
            output_tokens=used[1],
        )
        return verdict, is_hopeless

    async def _request(self, client: "AsyncOpenAI", chat: Chat) -> Reply | Trouble:
        """One request, and a second where the endpoint calls an option otherwise.

        Raises:
            ConfigError: no request will ever succeed.
        """
        from openai import OpenAIError

        messages: Any = chat.messages()
        while True:
            options = dict(self._options)
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    raw = await client.chat.completions.with_raw_response.create(
                        model=self._settings.model,
                        messages=messages,
                        **options,
                    )
                return reply_of(raw.http_response.text, self._endpoint)
            except TimeoutError:
                return Trouble(f"no answer within {self._settings.timeout_s:g} s")
            except OpenAIError as error:
                found = trouble_of(error, self._settings, self._endpoint, time.time())
                if found.refused_option not in options:
                    return found
                self._do_without(found.refused_option)

    def _do_without(self, option: str) -> None:
        """Models that reason know no `max_tokens` and choose their temperature themselves."""
        if option not in self._options:
            return  # another request has met this before
        value = self._options.pop(option)
        if option == "max_tokens":
            self._options["max_completion_tokens"] = value
        else:
            self._say(f"{self._settings.model} takes no temperature of 0; it samples by its own")

    def _answer_note(self, reply: Reply, *, is_verdict: bool) -> str:
        if not is_verdict:
            return reply.why_silent or "the judge's answer does not end with a verdict"
        return "" if "temperature" in self._options else "at the endpoint's own temperature"

    def _wait_s(self, trouble: Trouble, number: int) -> float:
        """How long the endpoint is left alone: as it says, else longer with each trouble.

        Args:
            trouble: of the last request.
            number: troubles of this kind that the question had before.

        Raises:
            ConfigError: so long that it is a quota, which nobody sits through.
        """
        # An endpoint that says 0 and goes on refusing would be asked without end.
        wait_s = max(trouble.wait_s, _FIRST_PAUSE_S) if trouble.wait_s else _growing(number)
        if wait_s > LONGEST_WAIT_S:
            message = f"{self._endpoint.url} wants {wait_s / 3600:.1f} hours of waiting"
            remedy = "what was judged is kept: start the same command again then"
            raise ConfigError.at("judge.base_url", f"{message} ({trouble.reason})", remedy)
        if wait_s >= _TOLD_WAIT_S:
            what = "rate limit: " if trouble.is_limit else ""
            self._say(f"{what}waiting for {wait_s:.0f} s ({trouble.reason})")
        return wait_s

    def _notice(self, verdict: Verdict) -> None:
        """Give up where one question after the other stays without a verdict.

        Raises:
            ConfigError: so many have.
        """
        self._failed_in_a_row = self._failed_in_a_row + 1 if verdict.verdict is None else 0
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            message = (
                f"{GIVE_UP_AFTER} questions in a row have no verdict of {self._settings.model}"
            )
            where = f"at {self._endpoint.url}, the last because: {verdict.note}"
            remedy = "what was judged is kept: mend it and start the same command again"
            raise ConfigError.at("judge", f"{message} {where}", remedy)


def _growing(number: int) -> float:
    """The pause after so many failures before, in seconds; not the same for all who wait."""
    pause_s: float = min(_FIRST_PAUSE_S * 2.0**number, _LONGEST_PAUSE_S)
    return pause_s * random.uniform(0.75, 1.25)
