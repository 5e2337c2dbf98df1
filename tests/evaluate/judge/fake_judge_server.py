"""A local OpenAI-compatible endpoint with known verdicts and injected faults.

It reads the two answers from the fences of the packaged template. It counts how often it gave a
verdict on each question, which reveals a client that loses or repeats questions.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

type Rule = Callable[[str, str], str]
"""Maps the answers shown as A and B to the verdict."""

type Fault = str | None
"""What a request meets: a status with an optional `Retry-After` (`429:7`), or `hang`, `drop`,
`half`, `html`, `empty`, `malformed`, `cut`, `refused`, `quota`, `options`."""


def longer(a: str, b: str) -> str:
    """The longer answer wins."""
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def first_shown(a: str, b: str) -> str:
    """The answer shown first wins: pure position bias."""
    return "A"


def tied(a: str, b: str) -> str:
    """Every question is a tie."""
    return "tie"


class FakeJudge:
    """A server that runs within a `with` block."""

    def __init__(
        self,
        rule: Rule = longer,
        fault: Callable[[int, tuple[str, str]], Fault] = lambda index, question: None,
        *,
        seconds: float = 0.0,
    ) -> None:
        """Args:

        rule: decides the verdicts.
        fault: maps the index of the request and the answers as shown to a fault.
        seconds: time that a verdict takes.
        """
        self.rule = rule
        self.fault = fault
        self.seconds = seconds
        self.served: Counter[tuple[str, str]] = Counter()
        """Verdicts given, by the answers as shown."""
        self.requests: list[dict[str, Any]] = []
        """Body of each request."""
        self.keys: set[str] = set()
        self.active = self.max_active = 0
        """Requests that are being served, now and at most."""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def wait_until_idle(self) -> None:
        """Returns when no request is being served any more."""
        while self.active:
            time.sleep(0.002)

    def __enter__(self) -> "FakeJudge":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """With the library's 5, simultaneous connections are delayed by a second."""

    def __init__(self, judge: FakeJudge) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.judge = judge

    def handle_error(self, *_: object) -> None:
        """Clients that disconnect are part of the tests."""


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The answers in a request, read from their fences."""
    text = body["messages"][-1]["content"]
    fence = re.match(r"(\w{16}) prompt begins\n", text)
    assert fence, text
    answers = [
        re.search(
            rf"^{fence[1]} answer {letter} begins\n(.*)\n{fence[1]} answer {letter} ends$",
            text,
            re.M | re.S,
        )
        for letter in "AB"
    ]
    assert answers[0] and answers[1], text
    return answers[0][1], answers[1][1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def judge(self) -> FakeJudge:
        assert isinstance(self.server, _Server)
        return self.server.judge

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = shown(body)
        with self.judge.lock:
            self.judge.requests.append(body)
            self.judge.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
            self.judge.active += 1
            self.judge.max_active = max(self.judge.max_active, self.judge.active)
            fault = self.judge.fault(len(self.judge.requests) - 1, question)
        try:
            if fault is not None:
                self._fail(fault, body)
                return
            time.sleep(self.judge.seconds)
            self._serve(question)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.judge.lock:
                self.judge.active -= 1

    def _serve(self, question: tuple[str, str]) -> None:
        with self.judge.lock:
            self.judge.served[question] += 1
        self._reply(f"I have read both.\n\nVerdict: {self.judge.rule(*question)}")

    def _reply(self, text: str | None, finish: str = "stop") -> None:
        self._send(200, json.dumps(_completion(text, finish)))

    def _send(
        self,
        status: int,
        text: str,
        headers: dict[str, str] | None = None,
        *,
        content_type: str = "application/json",
        claimed_length: int = 0,
    ) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(claimed_length or len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _error(
        self, status: int, message: str, headers: dict[str, str] | None = None, **fields: str
    ) -> None:
        error = {"message": message, "type": "error", **fields}
        self._send(status, json.dumps({"error": error}), headers)

    def _fail(self, fault: str, body: dict[str, Any]) -> None:
        key = self.headers["Authorization"]
        if fault == "hang":
            self.judge.closing.wait()
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "half":
            self._send(200, '{"choices": [', claimed_length=500)
            self.close_connection = True
        elif fault == "html":
            self._send(200, "<html>busy</html>", content_type="text/html")
        elif fault == "empty":
            self._send(200, '{"choices": []}')
        elif fault == "malformed":
            self._reply(f"Both are fine; your key is {key}. Verdict: A or B")
        elif fault == "cut":
            self._reply("Let me think about", "length")
        elif fault == "refused":
            self._reply(None, "content_filter")
        elif fault == "quota":
            self._error(429, "You exceeded your quota", code="insufficient_quota")
        elif fault == "options":
            self._reject_options(body)
        else:
            status, _, retry_after = fault.partition(":")
            headers = {"Retry-After": retry_after} if retry_after else None
            self._error(int(status), f"this is a {status}; you sent {key}", headers)

    def _reject_options(self, body: dict[str, Any]) -> None:
        """Behaves like a reasoning model."""
        for name, code in (("max_tokens", "parameter"), ("temperature", "value")):
            if name in body:
                self._error(400, f"{name}?", code=f"unsupported_{code}", param=name)
                return
        self._serve(shown(body))


def _completion(text: str | None, finish: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
