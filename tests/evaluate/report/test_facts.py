"""Facts about runs: results, speed, configuration."""

from pathlib import Path

import pytest

from megatron_idpo.evaluate.report.facts import (
    cost_facts,
    duration,
    record_facts,
    record_line,
    result_facts,
    run_facts,
    speed_facts,
)
from megatron_idpo.evaluate.report.inputs import RunInputs, read_runs
from megatron_idpo.train.starts import Start, write_start
from tests.sdpo.tiny_manifest import manifest

from .example_runs import CONFIG, write_likelihood, write_run, write_steps


def by_name(found: RunInputs) -> dict[str, tuple[str, str]]:
    facts = result_facts(found) | cost_facts(found) | run_facts(found)
    return {name: (cell.value, cell.note) for name, cell in facts.items()}


def test_facts_of_a_run(tmp_path: Path) -> None:
    facts = by_name(read_runs([write_run(tmp_path / "run")])[0])
    # Wilson's interval of 30 of 40.
    assert facts["Held-out accuracy"] == ("tied → 75 %", "95 % interval 60 to 86 %, 40 pairs")
    assert facts["Held-out margin"][0] == "0 → +1.000"
    assert facts["Time of steps"][0] == "1:20 min"
    assert facts["Tokens/s"][0] == "1.0k"
    assert facts["Peak memory"][0] == "3.2 GB"
    assert facts["Model"] == ("some/model", "llama, 4 layers, bf16")
    assert facts["Pairs"] == ("pairs.jsonl", "40 steps; epoch 1")
    objective = ("Intermediate DPO at layer 2", "sigmoid loss, β 0.2, intermediate weight 0.1")
    assert facts["Objective"] == objective
    assert facts["Trained"] == ("LoRA", "rank 8, alpha 16, dropout 0.05, targets all-linear")
    assert facts["Layout"][0] == "tensor 2"


def test_plain_dpo_with_all_weights(tmp_path: Path) -> None:
    config = CONFIG.replace("[2], intermediate_weight: 0.1", "[], intermediate_weight: 0.0")
    config = config.replace("lora:", "other:").replace("tensor: 2", "tensor: 1")
    facts = by_name(read_runs([write_run(tmp_path / "run", layers=(), config=config)])[0])
    assert facts["Objective"] == ("DPO at the final layer alone", "sigmoid loss, β 0.2")
    assert facts["Trained"] == ("All weights", "")
    assert "Layout" not in facts


def test_consecutive_layers_are_a_range(tmp_path: Path) -> None:
    facts = by_name(read_runs([write_run(tmp_path / "run", layers=(1, 2, 3))])[0])
    assert facts["Objective"][0] == "Intermediate DPO at layers 1 to 3"


def test_run_without_training_steps_has_no_speed(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text(lines[0])
    facts = by_name(read_runs([root])[0])
    assert facts["Held-out accuracy"] == ("tied", "")
    assert "Time of steps" not in facts and "Tokens/s" not in facts


def test_facts_of_an_sdpo_run(tmp_path: Path) -> None:
    root = write_steps(tmp_path / "run", manifest("complete", "complete", "training"))
    facts = by_name(read_runs([root])[0])
    assert facts["Objective"][0] == "sDPO, intermediate DPO at layer 2"
    assert "3 sDPO steps: 1,000, 2,000, 3,000 pairs" in facts["Pairs"][1]
    assert "each against its own step's reference" in facts["Held-out accuracy"][1]
    assert facts["Against the first model"][0] == "75 %, margin +0.500"


def test_evaluation_without_a_run(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    assert by_name(read_runs([tmp_path])[0]) == {"Evaluated": ("base, trained", "")}


def test_speed_is_weighted_by_time_without_the_first_steps() -> None:
    def logged(step: int, seconds: float, tokens: float) -> dict[str, float]:
        speed = {"throughput/step_s": seconds, "throughput/tokens_per_s": tokens}
        return {"step": step, **speed, "memory/peak_gb": float(step)}

    records = [logged(1, 50.0, 1.0), {"step": 5, "eval_loss": 1.0}, logged(11, 1.0, 100.0)]
    records += [logged(13, 10.0, 400.0), {"step": 13, "throughput/step_s": float("nan")}]
    # 50 s; 10 steps of 1 s; 2 steps of 10 s.
    assert {name: cell.value for name, cell in speed_facts(records).items()} == {
        "Time of steps": "1:20 min",
        "A step": "7 s",
        "Tokens/s": "300",
        "Peak memory": "13.0 GB",
    }


def test_single_step_has_a_speed() -> None:
    facts = speed_facts([{"step": 1, "throughput/step_s": 2.0, "throughput/tokens_per_s": 7.0}])
    assert facts["Tokens/s"].value == "7.00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.034, "0.034 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (3599.6, "1:00:00 h"),
        (90_000, "1d 01:00"),
        (float("nan"), "–"),
        (float("inf"), "–"),
    ],
)
def test_duration_has_the_unit_of_its_size(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def start(hour: int, step: int, **others: str) -> Start:
    values = {"command": "megatron-idpo train a.yaml", "device": "NVIDIA H200", "commit": "abc1234"}
    versions = {"megatron-idpo": "0.1.0", "torch": "2.14.1"}
    return Start(
        time=f"2026-11-29T{hour:02}:05:30+00:00",
        step=step,
        total_steps=40,
        processes=8,
        versions=versions,
        **{**values, **others},
    )


def test_record_of_a_resumed_run(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    for one in (start(9, 0), start(10, 20, device="NVIDIA H100"), start(11, 30)):
        write_start(root, one)
    facts = {name: (cell.value, cell.note) for name, cell in record_facts(run_of(root)).items()}
    last = "resumed 2 times, last 2026-11-29 11:05 UTC after step 30"
    assert facts == {
        "Started": ("2026-11-29 09:05 UTC", last),
        "Processes": ("8", ""),
        "Device": ("NVIDIA H200", "earlier: NVIDIA H100"),
        "Commit": ("abc1234", ""),
        "Versions": ("megatron-idpo 0.1.0, torch 2.14.1", ""),
        "Command": ("megatron-idpo train a.yaml", ""),
    }
    line = (
        "2026-11-29 11:05 UTC · 8 processes on NVIDIA H200 · megatron-idpo 0.1.0 · commit abc1234"
    )
    assert record_line(run_of(root)) == line


def test_run_without_a_record(tmp_path: Path) -> None:
    run = run_of(write_run(tmp_path / "run"))
    assert record_facts(run) == {} and record_line(run) == ""


def run_of(root: Path) -> RunInputs:
    (run,) = read_runs([root])
    return run
