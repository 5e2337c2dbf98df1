"""Requests to an endpoint: every question ends with one verdict or a reason."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.cli.main import main as command_line
from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.judge.api import RateLimiter, Reply, parse_reply
from megatron_idpo.evaluate.judge.endpoint import Endpoint
from megatron_idpo.evaluate.judge.run import main

from .fake_judge_server import FakeJudge, Fault
from .judge_case import KEY, KEY_VARIABLE, result, verdicts, won_and_lost, write_case

PAIR = "idpo-vs-base"
Faults = Callable[[int, tuple[str, str]], Fault]


def always(fault: Fault) -> Faults:
    return lambda index, _: fault


def once_each(fault: str) -> Faults:
    """The first request of each question fails."""
    seen: set[tuple[str, str]] = set()

    def fails(index: int, question: tuple[str, str]) -> Fault:
        is_new = question not in seen
        seen.add(question)
        return fault if is_new else None

    return fails


# ---- retries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "pause_s"),
    [
        ("500", 0.5),
        ("408", 0.5),
        ("429", 0.5),
        ("429:7", 7.0),
        ("503:7", 7.0),
        ("drop", 0.5),
        ("half", 0.5),
        ("html", None),
        ("empty", None),
        ("malformed", None),
        ("refused", None),
    ],
)
def test_transient_faults_are_retried(
    tmp_path: Path, pauses_s: list[float], fault: str, pause_s: float | None
) -> None:
    """Errors after a pause, which is `Retry-After` if given; replies without a verdict at once."""
    with FakeJudge(fault=once_each(fault)) as server:
        case = write_case(tmp_path, won_and_lost(2, 1), server.url)
        assert main(case, []) == 0
        assert set(server.served.values()) == {1} and len(server.served) == 6
        assert len(server.requests) == 12
    assert len(pauses_s) == (0 if pause_s is None else 6)
    assert all(0.75 * (pause_s or 0) <= pause <= (pause_s or 0) for pause in pauses_s)
    scores = result(tmp_path, PAIR)
    assert (scores["wins"], scores["losses"], scores["unjudged"]) == (2, 1, 0)
    lines = verdicts(tmp_path, PAIR)
    assert len(lines) == 6 and {line["attempts"] for line in lines} == {2}
    if fault in ("malformed", "refused"):
        assert {line["input_tokens"] for line in lines} == {200}, "both replies are paid for"


def test_attempts_of_a_question_are_bounded(tmp_path: Path) -> None:
    with FakeJudge(fault=always("500")) as server:
        case = write_case(tmp_path, won_and_lost(1, 0), server.url, max_attempts=3)
        with pytest.raises(DataError, match="1 of 1 prompts have no verdict"):
            main(case, [])
        assert len(server.requests) == 6
    lines = verdicts(tmp_path, PAIR)
    assert [line["attempts"] for line in lines] == [3, 3]
    assert lines[0]["note"] == "status 500: this is a 500; you sent Bearer [key]"


def test_a_request_without_answer_is_repeated_after_the_timeout(tmp_path: Path) -> None:
    with FakeJudge(fault=once_each("hang")) as server:
        case = write_case(tmp_path, won_and_lost(1, 0), server.url, timeout_s=0.3)
        assert main(case, ["judge.max_attempts=20"]) == 0
        assert len(server.served) == 2
    # A busy machine may answer other requests too late as well.
    assert min(line["attempts"] for line in verdicts(tmp_path, PAIR)) >= 2


def test_a_cut_off_reply_is_not_asked_again_at_temperature_0(tmp_path: Path) -> None:
    """It would be cut off again; a larger `max_tokens` asks again."""
    with FakeJudge(fault=always("cut")) as server:
        case = write_case(tmp_path, won_and_lost(2, 1), server.url)
        with pytest.raises(DataError, match="3 of 3 prompts have no verdict"):
            main(case, [])
        assert len(server.requests) == 6
        lines = verdicts(tmp_path, PAIR)
        assert {(line["attempts"], line["input_tokens"]) for line in lines} == {(1, 100)}
        assert all("raise judge.max_tokens" in line["note"] for line in lines)
        server.fault = always(None)
        assert main(case, ["judge.max_tokens=2048"]) == 0
        assert len(server.requests) == 12


def test_a_question_without_verdict_is_unjudged_and_asked_by_the_next_run(tmp_path: Path) -> None:
    answers = won_and_lost(12, 8)
    bad = {answers["idpo"][0], answers["idpo"][5]}

    def fault(index: int, question: tuple[str, str]) -> Fault:
        return "malformed" if bad & {*question} else None

    with FakeJudge(fault=fault) as server:
        case = write_case(tmp_path, answers, server.url)
        with pytest.raises(DataError, match=r"verdicts\.jsonl: 2 of 20 prompts have no verdict"):
            main(case, ["judge.max_attempts=3"])
        assert len(server.requests) == 36 + 4 * 3
        scores = result(tmp_path, PAIR)
        assert (scores["wins"], scores["losses"], scores["unjudged"]) == (10, 8, 2)
        assert scores["win_rate"] == 10 / 18 and "2 more unjudged" in scores["summary"]
        failed = [line for line in verdicts(tmp_path, PAIR) if line["verdict"] is None]
        assert len(failed) == 4
        for line in failed:
            assert line["text"].endswith("your key is Bearer [key]. Verdict: A or B")
            assert line["note"] == "the judge's answer does not end with a verdict"
            assert line["attempts"] == 3 and line["output_tokens"] == 30
        bad.pop()
        assert main(case, ["judge.max_attempts=3"]) == 0, "19 of 20 are enough"
        assert result(tmp_path, PAIR)["unjudged"] == 1
        bad.clear()
        assert main(case, []) == 0
        assert set(server.served.values()) == {1} and len(server.served) == 40
    scores = result(tmp_path, PAIR)
    assert (scores["wins"], scores["losses"], scores["unjudged"]) == (12, 8, 0)


# ---- rate limit --------------------------------------------------------------------------------


def test_requests_are_spaced_evenly_over_all_workers() -> None:
    now_s = 0.0
    sent_s = []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        until_s = now_s + seconds
        await asyncio.sleep(0)
        now_s = max(now_s, until_s)

    limiter = RateLimiter(30, sleep=sleep, clock=lambda: now_s)

    async def worker() -> None:
        for _ in range(3):
            await limiter.wait()
            sent_s.append(now_s)

    async def run() -> None:
        await asyncio.gather(worker(), worker(), worker())

    asyncio.run(run())
    assert sent_s == [2.0 * index for index in range(9)]


def test_retries_are_limited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    async def wait(self: RateLimiter, *_: object) -> None:
        waits.append(self._interval_s)

    monkeypatch.setattr(RateLimiter, "wait", wait)
    with FakeJudge(fault=once_each("500")) as server:
        case = write_case(tmp_path, won_and_lost(2, 0), server.url, requests_per_minute=120)
        assert main(case, []) == 0
        assert len(server.requests) == 8
    assert waits == [0.5] * 8


# ---- early stop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", r"judge\.key_variable: http://127.* rejects the key in FAKE_JUDGE_KEY"),
        ("402", r"judge\.model: .* does not serve fake \(status 402: this is a 402; you sent Be"),
        ("403", r"judge\.model: .* does not serve fake \(status 403"),
        ("404", r"judge\.model: http://127.* does not serve fake \(status 404: this is a 404"),
        ("quota", r"judge\.model: .* does not serve .*status 429: You exceeded your quota"),
    ],
)
def test_a_permanent_error_stops_at_once(tmp_path: Path, fault: str, message: str) -> None:
    with FakeJudge(fault=lambda index, _: fault if index >= 8 else None) as server:
        case = write_case(tmp_path, won_and_lost(10, 10), server.url, max_parallel=2)
        with pytest.raises(ConfigError, match=message) as raised:
            main(case, ["judge.max_attempts=2"])
        # The client retries every 429 once here; nothing else is retried.
        assert len(server.requests) <= (12 if fault == "quota" else 10)
    assert KEY not in str(raised.value)
    # Verdicts up to then are kept; the last one may have been under way.
    assert len(verdicts(tmp_path, PAIR)) in (7, 8)


@pytest.mark.parametrize("fault", ["malformed", "429:7300"])
def test_ten_failures_in_a_row_stop(tmp_path: Path, fault: str) -> None:
    """A `Retry-After` of hours is not waited for."""
    with FakeJudge(fault=always(fault)) as server:
        case = write_case(tmp_path, won_and_lost(50, 50), server.url, max_attempts=1)
        with pytest.raises(ConfigError, match=r"10 questions in a row .* last reason: \w+"):
            main(case, ["judge.max_parallel=1"])
        assert len(server.requests) == 10


def test_an_unreachable_endpoint_stops(tmp_path: Path) -> None:
    with FakeJudge() as server:
        url = server.url
    case = write_case(tmp_path, won_and_lost(10, 10), url, max_attempts=2)
    with pytest.raises(ConfigError, match=r"in a row got no verdict .* no connection \("):
        main(case, [])


def test_questions_that_failed_in_an_earlier_run_do_not_stop(tmp_path: Path) -> None:
    answers = won_and_lost(30, 0)
    bad = {*answers["idpo"][:6]}

    def fault(index: int, question: tuple[str, str]) -> Fault:
        return "malformed" if bad & {*question} else None

    with FakeJudge(fault=fault) as server:
        case = write_case(tmp_path, answers, server.url, max_attempts=1, max_parallel=1)
        with pytest.raises(ConfigError, match="10 questions in a row"):
            main(case, [])
        with pytest.raises(DataError, match="6 of 30 prompts have no verdict"):
            main(case, ["judge.max_parallel=8"])
        assert set(server.served.values()) == {1} and len(server.served) == 48
        assert len(server.requests) == 10 + 48 + 12


def test_a_rejected_question_is_asked_once_and_does_not_stop(tmp_path: Path) -> None:
    """For example a prompt that is too long for the judge."""
    answers = won_and_lost(20, 0)
    too_long = {*answers["idpo"][3:15]}
    with FakeJudge(fault=lambda _, question: "400" if too_long & {*question} else None) as server:
        with pytest.raises(DataError, match="12 of 20 prompts have no verdict"):
            main(write_case(tmp_path, answers, server.url, max_parallel=1), [])
        assert len(server.requests) == 40
    failed = [line for line in verdicts(tmp_path, PAIR) if line["verdict"] is None]
    assert {line["note"] for line in failed} == {"status 400: this is a 400; you sent Bearer [key]"}
    assert {line["attempts"] for line in failed} == {1}


def test_ctrl_c_keeps_all_verdicts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(index: int, question: tuple[str, str]) -> Fault:
        if index == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return None

    # The signal is ignored in processes that were started in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with FakeJudge(fault=interrupt) as server:
            case = write_case(tmp_path, won_and_lost(30, 30), server.url, max_parallel=2)
            assert command_line(["judge", str(case)]) == 130
            server.wait_until_idle()
            kept = len(verdicts(tmp_path, PAIR))
            assert 18 <= kept and server.served.total() - kept <= 2
            server.fault = always(None)
            assert main(case, []) == 0
            assert server.served.total() - 120 <= 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capfd.readouterr().err
    lines = verdicts(tmp_path, PAIR)
    assert len({(line["index"], line["order"]) for line in lines}) == len(lines) == 120


# ---- requests and replies ----------------------------------------------------------------------


def test_request_fields(tmp_path: Path) -> None:
    with FakeJudge() as server:
        assert main(write_case(tmp_path, won_and_lost(1, 0), server.url), []) == 0
        body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("fake", 0, 512)


def test_fields_that_reasoning_models_reject_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeJudge(fault=always("options")) as server:
        case = write_case(tmp_path, won_and_lost(3, 2), server.url, max_tokens=77)
        assert main(case, ["judge.max_attempts=1"]) == 0
        body = server.requests[-1]
    assert body["max_completion_tokens"] == 77 and {"max_tokens", "temperature"}.isdisjoint(body)
    assert caplog.messages.count("fake rejects temperature 0; it samples") == 1


def test_a_local_endpoint_needs_no_key_and_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    with FakeJudge() as server:
        assert main(write_case(tmp_path, won_and_lost(1, 0), server.url), []) == 0
        assert server.keys == {"none"}


ENDPOINT = Endpoint.of(
    JudgeConfig(model="m", base_url="http://localhost/v1", key_variable="K"), {"K": KEY}
)


def reply(message: Any, **fields: Any) -> Reply:
    return parse_reply(json.dumps({"choices": [{"message": message, **fields}]}), ENDPOINT)


@pytest.mark.parametrize(
    ("content", "text"),
    [("Verdict: A", "Verdict: A"), (f"{KEY}\nVerdict: A", "[key]\nVerdict: A"), (None, "")],
)
def test_reply_text_without_key(content: Any, text: str) -> None:
    assert reply({"role": "assistant", "content": content}) == Reply(text)


def test_reason_why_a_reply_has_no_verdict() -> None:
    cut = reply({"content": None, "reasoning_content": "Verdict: A"}, finish_reason="length")
    assert cut.text == "" and cut.is_cut and "raise judge.max_tokens" in cut.no_verdict_reason
    refused = reply({"content": None, "refusal": "I will not."}, finish_reason="stop")
    assert "refuses" in refused.no_verdict_reason


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        '{"error": {"message": "KEY"}}',
        '{"choices": null}',
        '{"choices": [null]}',
        '{"choices": [{"message": "Verdict: A"}]}',
        '{"choices": [{"message": {"content": [{"type": "text", "text": "Verdict: A"}]}}]}',
    ],
)
def test_a_body_that_is_not_a_completion_has_no_verdict(body: str) -> None:
    parsed = parse_reply(body.replace("KEY", KEY), ENDPOINT)
    assert parsed.text == "" and "is not a chat completion" in parsed.no_verdict_reason
    assert KEY not in parsed.no_verdict_reason


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 2}, (7, 2)),
        ({"prompt_tokens": None}, (0, 0)),
        (None, (0, 0)),
    ],
)
def test_missing_token_counts_are_zero(usage: Any, counts: tuple[int, int]) -> None:
    body = {"choices": [{"message": {"content": "Verdict: tie"}}], "usage": usage}
    parsed = parse_reply(json.dumps(body), ENDPOINT)
    assert (parsed.input_tokens, parsed.output_tokens) == counts
