"""Whatever an endpoint does, questions end with one verdict or a reason, and no key is told."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_idpo.cli.main import main as command_line
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.judge import api as judge_api
from megatron_idpo.evaluate.judge.main import main

from .fake_judge_server import HANG_S, FakeJudge, Fault
from .judge_case import KEY, KEY_VARIABLE, location, result, verdicts, won_and_lost, write_case

PAIR = "idpo-vs-base"
Faults = Callable[[int, tuple[str, str]], Fault]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(judge_api, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture(autouse=True)
def nobody_hears_the_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """In no file and no output of any of these tests."""
    yield
    message = "".join(capfd.readouterr())
    assert KEY not in message
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def first(faults: list[Fault]) -> Faults:
    """Faults of the first requests; the others are served."""
    return lambda number, _: faults[number] if number < len(faults) else None


def always(fault: Fault) -> Faults:
    return lambda number, _: fault


def once_each(fault: str) -> Faults:
    """The first request about each question fails."""
    seen: set[tuple[str, str]] = set()

    def fails(number: int, question: tuple[str, str]) -> Fault:
        is_new = question not in seen
        seen.add(question)
        return fault if is_new else None

    return fails


PASSING = ("500", "502", "503:0.01", "408", "429", "429:0.05", "drop", "half", "html", "empty")


@pytest.mark.parametrize("fault", [*PASSING, "malformed", "refused"])
def test_what_passes_is_asked_again(tmp_path: Path, fault: str) -> None:
    with FakeJudge(fault=once_each(fault)) as server:
        case = write_case(tmp_path, won_and_lost(4, 2), server.url, max_parallel=12)
        assert main(case, []) == 0
        assert set(server.served.values()) == {1} and len(server.served) == 12
        assert len(server.requests) == 24
    found = result(tmp_path, PAIR)
    assert (found["wins"], found["losses"], found["unjudged"]) == (4, 2, 0)
    lines = verdicts(tmp_path, PAIR)
    assert len(lines) == 12
    assert {line["attempts"] for line in lines} == {1 if fault.startswith("429") else 2}
    if fault in ("malformed", "refused"):
        assert {line["input_tokens"] for line in lines} == {200}, "both answers are paid for"


def test_an_answer_that_was_cut_off_is_paid_for_once(tmp_path: Path) -> None:
    """At a temperature of 0 it would be cut off again; with more room it is asked again."""
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


def test_what_never_answers_is_asked_again(tmp_path: Path) -> None:
    with FakeJudge(fault=once_each("hang")) as server:
        began_s = time.monotonic()
        assert main(write_case(tmp_path, won_and_lost(1, 0), server.url, timeout_s=3.0), []) == 0
        assert 3 <= time.monotonic() - began_s < HANG_S
        assert len(server.served) == 2
    # On a busy machine a good answer may be late, too.
    assert min(line["attempts"] for line in verdicts(tmp_path, PAIR)) >= 2


def test_every_fault_at_once(tmp_path: Path) -> None:
    faults: list[Fault] = [*PASSING, "malformed", "refused", "drop", "500", "500"]
    with FakeJudge(fault=first(faults)) as server:
        case = write_case(tmp_path, won_and_lost(12, 8), server.url)
        assert main(case, ["judge.max_attempts=20"]) == 0
        assert set(server.served.values()) == {1} and len(server.served) == 40
        assert len(server.requests) == 40 + len(faults)
    found = result(tmp_path, PAIR)
    assert (found["wins"], found["losses"]) == (12, 8)


def test_retry_after_is_kept_by_all(tmp_path: Path) -> None:
    """After the first answer of 429 no request comes for the time that it says."""
    with FakeJudge(fault=first(["429:0.7"])) as server:
        case = write_case(tmp_path, won_and_lost(5, 5), server.url, max_parallel=1)
        assert main(case, ["judge.max_attempts=1"]) == 0, "a limit uses up no attempt"
        came_s = [at for at, _ in server.requests]
    assert came_s[1] - came_s[0] >= 0.7
    assert len(came_s) == 21 and result(tmp_path, PAIR)["unjudged"] == 0


def test_a_limit_that_says_0_is_waited_out_all_the_same(tmp_path: Path) -> None:
    """Else an endpoint that says so and goes on refusing would be asked without a pause."""
    with FakeJudge(fault=first(["429:0"] * 6)) as server:
        case = write_case(tmp_path, won_and_lost(1, 0), server.url, max_parallel=1)
        assert main(case, []) == 0
        came_s = [at for at, _ in server.requests]
    # Pauses double from 0.01 s, less a quarter at most.
    assert len(came_s) == 8 and came_s[6] - came_s[0] >= 0.75 * 0.63


@pytest.mark.parametrize("fault", ["429:0.02", "503:0.02"])
def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(judge_api, "LONGEST_WAIT_S", 0.1)
    with FakeJudge(fault=always(fault)) as server:
        case = write_case(tmp_path, won_and_lost(1, 0), server.url, max_attempts=100)
        with pytest.raises(DataError, match="1 of 1 prompts have no verdict"):
            main(case, ["judge.max_parallel=1"])
        assert len(server.requests) <= 2 * 6
    assert verdicts(tmp_path, PAIR)[0]["note"].startswith(f"status {fault[:3]}")


def test_a_limit_in_the_middle_stops_the_others_too(tmp_path: Path) -> None:
    with FakeJudge(fault=lambda n, _: "429:0.6" if n == 8 else None, seconds=0.02) as server:
        case = write_case(tmp_path, won_and_lost(10, 10), server.url, max_parallel=4)
        assert main(case, []) == 0
        came_s = [at for at, _ in server.requests]
    # Those under way at that moment are not called back.
    late = [at - came_s[8] for at in came_s if at - came_s[8] > 0.3]
    assert len(late) >= 41 - 9 - 2 * 4 and min(late) >= 0.6


def test_requests_per_minute(tmp_path: Path) -> None:
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(3, 2), server.url, requests_per_minute=1200)
        assert main(case, []) == 0
        came_s = [at for at, _ in server.requests]
    assert came_s[-1] - came_s[0] >= 9 * 0.05 * 0.9, "10 requests at 20 a second"


def test_what_has_no_verdict_is_unjudged_and_asked_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = won_and_lost(12, 8)
    bad = {answers["idpo"][0], answers["idpo"][5]}

    def fault(number: int, question: tuple[str, str]) -> Fault:
        return "malformed" if bad & {*question} else None

    with FakeJudge(fault=fault) as server:
        case = write_case(tmp_path, answers, server.url)
        with pytest.raises(DataError, match=r"verdicts\.jsonl: 2 of 20 prompts have no verdict"):
            main(case, ["judge.max_attempts=3"])
        assert len(server.requests) == 36 + 4 * 3
        found = result(tmp_path, PAIR)
        assert (found["wins"], found["losses"], found["unjudged"]) == (10, 8, 2)
        assert found["win_rate"] == 10 / 18 and "2 more unjudged" in found["message"]
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
    found = result(tmp_path, PAIR)
    assert (found["wins"], found["losses"], found["unjudged"]) == (12, 8, 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", r"judge\.key_variable: http://127.* refuses the key in FAKE_JUDGE_KEY"),
        ("402", r"judge\.model: .* refuses to serve fake \(status 402: this is a 402; you sent Be"),
        ("403", r"judge\.model: .* refuses to serve fake \(status 403"),
        ("404", r"judge\.model: http://127.* does not serve fake \(status 404: this is a 404"),
        ("quota", r"judge\.model: .* refuses .*status 429: You exceeded your quota"),
        ("503:36000", r"judge\.base_url: .* wants 10\.0 hours of waiting"),
        ("429:7300", r"judge\.base_url: .* wants 2\.0 hours of waiting"),
    ],
)
def test_what_never_passes_ends_at_once(tmp_path: Path, fault: str, message: str) -> None:
    with FakeJudge(fault=lambda number, _: fault if number >= 8 else None) as server:
        case = write_case(tmp_path, won_and_lost(10, 10), server.url, max_parallel=2)
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=message) as raised:
            main(case, [])
        assert time.monotonic() - began_s < 60 and len(server.requests) <= 10
    assert KEY not in str(raised.value)
    # What was judged before is kept; the answer before the refusal may still be under way then.
    assert len(verdicts(tmp_path, PAIR)) in (7, 8)


def test_a_prompt_too_long_for_the_judge_is_not_asked_again(tmp_path: Path) -> None:
    answers = won_and_lost(20, 0)
    long = answers["idpo"][3]
    with FakeJudge(fault=lambda _, question: "400" if long in question else None) as server:
        assert main(write_case(tmp_path, answers, server.url), []) == 0
        assert len(server.requests) == 40, "once for each order"
    failed = [line for line in verdicts(tmp_path, PAIR) if line["verdict"] is None]
    assert [line["index"] for line in failed] == [3, 3]
    assert failed[0]["note"] == "status 400: this is a 400; you sent Bearer [key]"


def test_a_row_of_failures_ends_it(tmp_path: Path) -> None:
    with FakeJudge(fault=always("malformed")) as server:
        case = write_case(tmp_path, won_and_lost(50, 50), server.url, max_attempts=1)
        with pytest.raises(ConfigError, match=r"10 questions in a row .* does not end with a verd"):
            main(case, ["judge.max_parallel=1"])
        assert len(server.requests) == 10


def test_a_row_of_bad_questions_does_not_bar_the_way(tmp_path: Path) -> None:
    """At the next start they are known to be bad, and do not end it."""
    answers = won_and_lost(120, 0)
    bad = {*answers["idpo"][:6]}

    def fault(number: int, question: tuple[str, str]) -> Fault:
        return "malformed" if bad & {*question} else None

    with FakeJudge(fault=fault) as server:
        case = write_case(tmp_path, answers, server.url, max_attempts=1, max_parallel=1)
        with pytest.raises(ConfigError, match="10 questions in a row"):
            main(case, [])
        assert main(case, ["judge.max_parallel=8"]) == 0
        assert set(server.served.values()) == {1} and len(server.served) == 228
        assert len(server.requests) == 10 + 228 + 12
    assert result(tmp_path, PAIR)["unjudged"] == 6


def test_questions_that_an_endpoint_cannot_take_do_not_end_it(tmp_path: Path) -> None:
    with FakeJudge(fault=always("400")) as server:
        case = write_case(tmp_path, won_and_lost(10, 10), server.url)
        with pytest.raises(DataError, match="20 of 20 prompts have no verdict"):
            main(case, [])
        assert len(server.requests) == 40
    assert result(tmp_path, PAIR)["win_rate"] is None


def test_nobody_there(tmp_path: Path) -> None:
    with FakeJudge() as server:
        url = server.url
    case = write_case(tmp_path, won_and_lost(10, 10), url, max_attempts=2)
    with pytest.raises(ConfigError, match=r"in a row have no verdict .* no connection \("):
        main(case, [])


def test_models_that_reason_have_options_of_their_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with FakeJudge(fault=always("options")) as server:
        case = write_case(tmp_path, won_and_lost(3, 2), server.url, max_tokens=77)
        assert main(case, ["judge.max_attempts=1"]) == 0
        body = server.requests[-1][1]
    assert body["max_completion_tokens"] == 77 and {"max_tokens", "temperature"}.isdisjoint(body)
    assert capfd.readouterr().out.count("fake takes no temperature of 0") == 1
    notes = {line["note"] for line in verdicts(tmp_path, PAIR)}
    assert notes == {"at the endpoint's own temperature"}


def test_what_is_asked(tmp_path: Path) -> None:
    with FakeJudge() as server:
        assert main(write_case(tmp_path, won_and_lost(1, 0), server.url), []) == 0
        body = server.requests[0][1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("fake", 0, 512)


def test_no_key_is_needed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # leads nowhere
    with FakeJudge() as server:
        assert main(write_case(tmp_path, won_and_lost(1, 0), server.url), []) == 0
        assert server.keys == {"none"}


def test_ctrl_c_keeps_what_was_judged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FakeJudge(seconds=0.03) as server:
        case = write_case(tmp_path, won_and_lost(30, 30), server.url, max_parallel=2)

        def interrupt() -> None:
            while server.served.total() < 20:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        # Whoever started the tests in the background had them ignore the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread.start()
        try:
            assert command_line(["judge", str(case)]) == 130
        finally:
            thread.join()
            signal.signal(signal.SIGINT, before)
        time.sleep(0.1)  # what was under way is served, for nobody
        kept = len(verdicts(tmp_path, PAIR))
        assert 20 <= kept + 2 and server.served.total() - kept <= 2
        assert "interrupted; what was saved before is complete" in capfd.readouterr().err
        assert main(case, []) == 0
        assert server.served.total() - 120 <= 2
    lines = verdicts(tmp_path, PAIR)
    assert len({(line["index"], line["order"]) for line in lines}) == len(lines) == 120
    assert not list(location(tmp_path, PAIR).glob(".result.json.fresh*"))
