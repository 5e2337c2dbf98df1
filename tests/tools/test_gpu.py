"""`make gpu`: order, time limits, resuming, and a rehearsal on a phantom GPU."""

import json
import os
import time
from pathlib import Path

import gpu
import pytest

PLANNED_REL = 0.05
"""What `plan` promises."""

MEASURED = {
    "peak_bytes": 41e9,
    "planned_bytes": 40e9,
    "reserved_bytes": 43e9,
    "used_bytes": 45e9,
    "planned_total_bytes": 44e9,
    "step_s": 0.5,
    "estimated_step_s": 0.4,
    "tokens_per_s": 32768.0,
    "mfu": 0.42,
}


def step(name: str, program: str, expected_s: float = 1.0) -> gpu.Step:
    return gpu.Step(name, ("-c", program), expected_s)


def run(steps: list[gpu.Step], output: Path, budget_s: float = 60.0) -> dict[str, dict]:
    return gpu.run_steps(steps, output, budget_s, dict(os.environ))


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(tmp_path: Path):
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    good, bad = step("good", f"{note}('g')"), step("bad", f"{note}('b'); raise SystemExit(3)")
    first = run([good, bad], tmp_path / "out")
    assert [first[name]["code"] for name in ("good", "bad")] == [0, 3]
    run([good, bad], tmp_path / "out")
    assert (tmp_path / "ran").read_text() == "gbb"


def test_a_step_that_needs_more_time_than_is_left_is_not_started(tmp_path: Path):
    results = run([step("long", "", 100.0), step("short", "", 1.0)], tmp_path, 30.0)
    assert list(results) == ["short"]


def test_a_step_ends_with_the_budget(tmp_path: Path):
    results = run([step("hangs", "print('begun', flush=True); input()", 0.1)], tmp_path, 1.0)
    # Without a terminal `input` fails at once instead: both end.
    assert results["hangs"]["code"] != 0


HANGS = """import subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid)); child.wait()"""


def test_a_step_that_hangs_ends_with_its_children_and_runs_last_again(tmp_path, capsys):
    pid = tmp_path / "pid"
    hangs = gpu.Step("hangs", ("-c", HANGS, str(pid)), 1)
    works = step("works", "print('{\"x\": 1}')")
    results = run([hangs, works], tmp_path / "out")
    assert results["hangs"]["code"] == 124 and results["works"]["measured"] == {"x": 1}
    time.sleep(0.1)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    (tmp_path / "out" / "works.json").unlink()
    capsys.readouterr()
    run([hangs, works], tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[0].startswith("works: code 0")


def test_the_summary_has_measured_against_planned(tmp_path: Path):
    results = run([step("8b", f"print({json.dumps(json.dumps(MEASURED))})")], tmp_path)
    summary = gpu.summarize(results, "NVIDIA H100")
    assert (
        "| 8b | 41.00 | 40.00 | 43.00 | 45.00 | 44.00 | 0.500 | 0.400 | 32,768 | 42.0% |" in summary
    )


def test_the_summary_has_earlier_results_and_names_what_is_missing(tmp_path: Path):
    run([step("head", "print('42 ms')")], tmp_path)
    summary = gpu.summarize(run([step("8b-lora", "")], tmp_path), "NVIDIA H100")
    assert "42 ms" in summary and "8b-lora: code 0" in summary
    assert "Not run: tests-training, tests-lora, 8b-lora-tap," in summary


def test_the_summary_compares_with_trl(tmp_path: Path):
    ours = {**MEASURED, "pairs_per_s": 30.0}
    theirs = {"pairs_per_s": 12.0, "trl_peak_bytes": 60e9, "step_s": 1.0, "liger": False}
    sides = {"8b": ours, "trl-8b": theirs}
    steps = [step(name, f"print({json.dumps(json.dumps(one))})") for name, one in sides.items()]
    summary = gpu.summarize(run(steps, tmp_path), "NVIDIA H100")
    assert "| 8b | 30.00 | 12.00 | 2.50 | 41.00 | 60.00 | no |" in summary


def test_steps_are_unique_and_their_programs_exist():
    assert len({one.name for one in gpu.STEPS}) == len(gpu.STEPS)
    for one in gpu.STEPS:
        for words in filter(None, (one.words, one.rehearsed)):
            files = [word for word in words if word.endswith(".py")]
            assert files and all((gpu.ROOT / file).is_file() for file in files)


# Three programs that import torch, one of them with two runs: a minute and more.
@pytest.mark.exhaustive
def test_everything_can_be_rehearsed_on_a_phantom_gpu(has_phantom_gpu: None, tmp_path: Path):
    code = gpu.main(["--phantom", "--output", str(tmp_path), "--budget-s", "900"])
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert code == 0, results
    assert set(results) == {one.name for one in gpu.STEPS if one.rehearsed}
    assert results["tiny-tap"]["measured"]["peak_bytes"] > 0
    for name in ("8b-lora-tap", "1b-full-tap", "3b-lora-tap-recompute"):
        measured = results[name]["measured"]
        assert measured["peak_bytes"] == pytest.approx(measured["planned_bytes"], rel=PLANNED_REL)
    for name in ("tests-training", "tests-lora", "tests-head", "tests-attention"):
        assert "passed" in results[name]["output"][-1]
