"""A judge run that is killed and started again: no verdict is lost, none counts twice."""

import os
import subprocess
import sys
import time
from pathlib import Path

from .fake_judge_server import FakeJudge, shown
from .judge_case import (
    KEY,
    KEY_VARIABLE,
    comparison_directory,
    result,
    verdicts,
    won_and_lost,
    write_case,
)

PAIR = "idpo-vs-base"
PARALLEL = 4
TIMEOUT_S = 120
WINS, LOSSES = 35, 25
QUESTIONS = 2 * (WINS + LOSSES)


def start(case: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_idpo", "judge", str(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1"},
    )


def kill_after(case: Path, server: FakeJudge, verdicts: int) -> str:
    """Starts a run and kills it after so many verdicts; returns what it printed."""
    process = start(case)
    until_s = time.monotonic() + TIMEOUT_S
    while server.served.total() < verdicts:
        assert process.poll() is None and time.monotonic() < until_s, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    printed, _ = process.communicate()
    server.wait_until_idle()
    return printed


def test_resume_after_a_kill_loses_and_repeats_no_verdict(tmp_path: Path) -> None:
    answers = won_and_lost(WINS, LOSSES)
    index_of = {text: index for texts in answers.values() for index, text in enumerate(texts)}
    first = set(answers["idpo"])

    def stored() -> list[tuple[int, str]]:
        return [(line["index"], line["order"]) for line in verdicts(tmp_path, PAIR)]

    faults = {7: "500", 30: "drop", 61: "malformed", 95: "429:0.1", 110: "half"}
    with FakeJudge(fault=lambda index, _: faults.get(index), seconds=0.02) as server:
        case = write_case(tmp_path, answers, server.url, max_parallel=PARALLEL)
        printed = kill_after(case, server, verdicts=50)
        path = comparison_directory(tmp_path, PAIR) / "verdicts.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])
        kept = stored()
        # At most the requests that were under way are lost.
        assert 0 <= server.served.total() - len(kept) <= PARALLEL
        assert not (comparison_directory(tmp_path, PAIR) / "result.json").exists()
        with path.open("ab") as file:  # an incomplete line, as another kill may leave it
            file.write(b'{"index": 3, "order": "a')
        num_requests = len(server.requests)
        process = start(case)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        printed += output
        assert process.returncode == 0, output
        asked = [shown(body)[0] for body in server.requests[num_requests:]]
        repeated = {(index_of[a], "ab" if a in first else "ba") for a in asked} & set(kept)
        assert not repeated, "asked although the verdict was stored"
        assert f"{len(kept)} verdicts from an earlier run" in output
        assert f"{QUESTIONS - len(kept)} questions to ask" in output
        assert stored()[: len(kept)] == kept
        assert QUESTIONS <= server.served.total() <= QUESTIONS + PARALLEL
        assert server.keys == {KEY}
    lines = verdicts(tmp_path, PAIR)
    assert len(lines) == len({(line["index"], line["order"]) for line in lines}) == QUESTIONS
    scores = result(tmp_path, PAIR)
    assert (scores["wins"], scores["losses"], scores["ties"]) == (WINS, LOSSES, 0)
    assert KEY not in printed
