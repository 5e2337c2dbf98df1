"""Killed in the middle and started again: no verdict lost, none twice, no key left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from .fake_judge_server import FakeJudge, shown
from .judge_case import KEY, KEY_VARIABLE, location, result, verdicts, won_and_lost, write_case

PAIR = "idpo-vs-base"
PARALLEL = 4
WAIT_S = 120
WINS, LOSSES = 45, 30
QUESTIONS = 2 * (WINS + LOSSES)


def start(case: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_idpo", "judge", str(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1"},
    )


def killed(case: Path, server: FakeJudge, after: int) -> str:
    """What a run printed that SIGKILL ended once so many verdicts were given in all."""
    process = start(case)
    until_s = time.monotonic() + WAIT_S
    while server.served.total() < after:
        assert process.poll() is None and time.monotonic() < until_s, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    printed, _ = process.communicate()
    while server.under_way:
        time.sleep(0.002)
    return printed


def test_killed_twice(tmp_path: Path) -> None:
    answers = won_and_lost(WINS, LOSSES)
    index_of = {text: at for texts in answers.values() for at, text in enumerate(texts)}
    first = set(answers["idpo"])

    def asked(server: FakeJudge, since: int) -> list[tuple[int, str]]:
        found = [shown(body) for _, body in server.requests[since:]]
        return [(index_of[a], "ab" if a in first else "ba") for a, _ in found]

    def stored() -> list[tuple[int, str]]:
        return [(line["index"], line["order"]) for line in verdicts(tmp_path, PAIR)]

    faults = {7: "500", 30: "drop", 61: "malformed", 95: "429:0.1", 120: "half"}
    printed = ""
    with FakeJudge(fault=lambda number, _: faults.get(number), seconds=0.02) as server:
        case = write_case(tmp_path, answers, server.url, max_parallel=PARALLEL)
        kept: list[tuple[int, str]] = []
        for kills, after in ((1, 40), (2, 100)):
            before = len(server.requests)
            printed += killed(case, server, after)
            assert not set(kept) & set(asked(server, before)), "asked although it was stored"
            path = location(tmp_path, PAIR) / "verdicts.jsonl"
            if not path.read_bytes().endswith(b"\n"):  # half a line, which the next start cuts off
                path.write_bytes(path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1])
            kept = stored()
            # Lost is what was under way at that moment, at most.
            assert 0 <= server.served.total() - len(kept) <= kills * PARALLEL
            assert not (location(tmp_path, PAIR) / "result.json").exists()
        with path.open("ab") as file:  # as a kill at another moment would leave it
            file.write(b'{"index": 3, "order": "a')
        before = len(server.requests)
        process = start(case)
        rest, _ = process.communicate(timeout=WAIT_S)
        printed += rest
        assert process.returncode == 0, rest
        assert not set(kept) & set(asked(server, before))
        assert f"{len(kept)} verdicts are there already" in rest
        assert f"{QUESTIONS - len(kept)} questions to put" in rest
        assert stored()[: len(kept)] == kept
        assert QUESTIONS <= server.served.total() <= QUESTIONS + 2 * PARALLEL
        assert server.keys == {KEY}
    lines = verdicts(tmp_path, PAIR)
    assert len(lines) == len({(line["index"], line["order"]) for line in lines}) == QUESTIONS
    found = result(tmp_path, PAIR)
    assert (found["wins"], found["losses"], found["ties"]) == (WINS, LOSSES, 0)
    assert KEY not in printed
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
