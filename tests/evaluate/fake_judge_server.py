"""An endpoint like OpenAI's on this machine, whose verdicts follow a rule and whose faults are set.

It reads the two answers out of the packaged template's fences, and counts, for each question, how
often it gave a verdict, which is what a client that loses or repeats questions would be found by.
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
"""From the answers shown as A and B to the words of the verdict."""

type Fault = str | None
"""What goes wrong with a request: a status with, perhaps, a `Retry-After` (`429:0.2`), or `hang`,
`drop`, `half`, `html`, `empty`, `malformed`, `cut`, `refused`, `echo`, `quota`, `options`."""


HANG_S = 30.0


def longer(a: str, b: str) -> str:
    """The longer answer is the better one."""
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def first_shown(a: str, b: str) -> str:
    """What comes first is better: biased by position, and by nothing else."""
    return "A"


def tied(a: str, b: str) -> str:
    """Everything is as good as everything."""
    return "tie"


class FakeJudge:
    """A server for the length of a `with` block."""

    def __init__(
        self,
        rule: Rule = longer,
        fault: Callable[[int, tuple[str, str]], Fault] = lambda number, question: None,
        *,
        seconds: float = 0.0,
    ) -> None:
        """Args:

        rule: who wins.
        fault: from the number of the request (from 0) and the answers as shown to what fails.
        seconds: that each verdict takes.
        """
        self.rule = rule
        self.fault = fault
        self.seconds = seconds
        self.served: Counter[tuple[str, str]] = Counter()
        """Verdicts given, by the answers as they were shown."""
        self.requests: list[tuple[float, dict[str, Any]]] = []
        """When each request came, and its body."""
        self.keys: set[str] = set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "FakeJudge":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """With the 5 of the library, connections that come at once are put off by a second."""

    def __init__(self, judge: FakeJudge) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.judge = judge

    def handle_error(self, *_: object) -> None:
        """Clients that have gone are what is tested here."""


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The answers in a request, out of their fences."""
    text = body["messages"][-1]["content"]
    fence = re.match(r"(\w{16}) prompt begins\n", text)
    assert fence, text
    found = [
        re.search(
            rf"^{fence[1]} answer {letter} begins\n(.*)\n{fence[1]} answer {letter} ends$",
            text,
            re.M | re.S,
        )
        for letter in "AB"
    ]
    assert found[0] and found[1], text
    return found[0][1], found[1][1]


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
            number = len(self.judge.requests)
            self.judge.requests.append((time.monotonic(), body))
            self.judge.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
            self.judge.under_way += 1
            self.judge.most_under_way = max(self.judge.most_under_way, self.judge.under_way)
        try:
            with self.judge.lock:
                fault = self.judge.fault(number, question)
            if fault is not None:
                self._fail(fault, body)
                return
            time.sleep(self.judge.seconds)
            word = self.judge.rule(*question)
            with self.judge.lock:
                self.judge.served[question] += 1
            self._reply(f"I have read both.\n\nVerdict: {word}")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.judge.lock:
                self.judge.under_way -= 1

    def _reply(self, text: str | None, finish: str = "stop") -> None:
        self._send(200, json.dumps(_completion(text, finish)))

    def _send(
        self,
        status: int,
        text: str,
        headers: dict[str, str] | None = None,
        *,
        kind: str = "application/json",
        claimed: int = 0,
    ) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(claimed or len(data)))
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
            time.sleep(HANG_S)
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "half":
            self._send(200, '{"choices": [', claimed=500)
            self.close_connection = True
        elif fault == "html":
            self._send(200, "<html>busy</html>", kind="text/html")
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
            self._options(body)
        else:
            status, _, after = fault.partition(":")
            headers = {"Retry-After": after} if after else None
            self._error(int(status), f"this is a {status}; you sent {key}", headers)

    def _options(self, body: dict[str, Any]) -> None:
        """Like a model that reasons."""
        if "max_tokens" in body:
            self._error(
                400,
                "Use 'max_completion_tokens'",
                code="unsupported_parameter",
                param="max_tokens",
            )
        elif "temperature" in body:
            self._error(400, "Only the default (1)", code="unsupported_value", param="temperature")
        else:
            question = shown(body)
            with self.judge.lock:
                self.judge.served[question] += 1
            self._reply(f"Verdict: {self.judge.rule(*question)}")


def _completion(text: str | None, finish: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
