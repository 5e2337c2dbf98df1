"""What stands at the top of the page."""

from pathlib import Path

import pytest

from megatron_idpo.evaluate.report.headline import result_facts, trained_facts
from megatron_idpo.evaluate.report.headline_speed import speed_facts, speed_figures
from megatron_idpo.evaluate.report.inputs import Found, find

from ...sdpo.tiny_manifest import manifest
from .shown_runs import CONFIG, write_likelihood, write_run, write_steps


def by_name(found: Found) -> dict[str, tuple[str, str]]:
    facts = [*result_facts(found), *trained_facts(found)]
    return {fact.name: (fact.value, fact.note) for fact in facts}


def test_a_run(tmp_path: Path) -> None:
    facts = by_name(find([write_run(tmp_path / "run")])[0])
    # Wilson's interval of 30 of 40.
    assert facts["Held-out accuracy"] == ("tied → 75 %", "95 % interval 60 to 86 %, 40 pairs")
    assert facts["Held-out margin"][0] == "0 → +1.000"
    assert facts["Time of steps"][0] == "1:20 min"
    assert facts["Tokens per second"][0] == "1.0k"
    assert facts["Peak memory"][0] == "3.2 GB"
    assert facts["Model"] == ("some/model", "llama, 4 layers, bf16")
    assert facts["Pairs"] == ("pairs.jsonl", "40 steps of 8 pairs; 1 epoch")
    objective = ("Intermediate DPO at layer 2 of 4", "sigmoid loss, β 0.2, intermediate weight 0.1")
    assert facts["Objective"] == objective
    assert facts["Trained"] == ("LoRA, rank 8", "α 16, dropout 0.05, on all-linear")
    assert facts["Layout"][0] == "tensor 2"
    assert facts["Written by"][0] == "transformers 5.24.0"


def test_plain_dpo_of_all_weights(tmp_path: Path) -> None:
    config = CONFIG.replace("[2], intermediate_weight: 0.1", "[], intermediate_weight: 0.0")
    config = config.replace("lora:", "other:").replace("tensor: 2", "tensor: 1")
    facts = by_name(find([write_run(tmp_path / "run", layers=(), config=config)])[0])
    assert facts["Objective"] == ("DPO at the final layer alone", "sigmoid loss, β 0.2")
    assert facts["Trained"] == ("All weights", "")
    assert facts["Layout"][0] == "whole model in each process"


def test_many_layers_in_a_row(tmp_path: Path) -> None:
    facts = by_name(find([write_run(tmp_path / "run", layers=(1, 2, 3))])[0])
    assert facts["Objective"][0] == "Intermediate DPO at layers 1 to 3 of 4"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text(lines[0])
    facts = by_name(find([root])[0])
    assert facts["Held-out accuracy"] == ("tied", ""), "an interval of nothing"
    assert "Time of steps" not in facts and "Tokens per second" not in facts


def test_a_run_of_several_steps(tmp_path: Path) -> None:
    root = write_steps(tmp_path / "run", manifest("complete", "complete", "training"))
    facts = by_name(find([root])[0])
    assert facts["Objective"][0] == "sDPO, intermediate DPO at layer 2 of 4"
    assert "3 sDPO steps: 1,000, 2,000, 3,000 pairs" in facts["Pairs"][1]
    assert "each against its own step's reference" in facts["Held-out accuracy"][1]
    assert facts["Against the first model"][0] == "75 %, margin +0.500"


def test_an_evaluation_by_itself(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    assert by_name(find([tmp_path])[0]) == {"Evaluated": ("base, trained", "")}


def test_rates_are_weighed_by_time_and_leave_the_first_steps_out() -> None:
    def logged(step: int, seconds: float, tokens: float) -> dict[str, float]:
        speed = {"throughput/step_s": seconds, "throughput/tokens_per_s": tokens}
        return {"step": step, **speed, "memory/peak_gb": float(step)}

    records = [logged(1, 50.0, 1.0), {"step": 5, "eval_loss": 1.0}, logged(11, 1.0, 100.0)]
    records += [logged(13, 10.0, 400.0), {"step": 13, "throughput/step_s": float("nan")}]
    speed = speed_figures(records)
    # 50 s; 10 steps of 1 s; 2 steps of 10 s.
    assert speed.seconds == pytest.approx(80)
    assert speed.means["throughput/tokens_per_s"] == pytest.approx((10 * 100 + 20 * 400) / 30)
    assert speed.peak_gb == 13
    facts = {fact.name: fact.value for fact in speed_facts(records)}
    assert facts == {
        "Time of all steps": "1:20 min",
        "A step": "7.0 s",
        "Tokens per second": "300",
        "Peak memory": "13.0 GB",
    }


def test_a_run_of_one_step_has_rates_all_the_same() -> None:
    speed = speed_figures([{"step": 1, "throughput/step_s": 2.0, "throughput/tokens_per_s": 7.0}])
    assert speed.means["throughput/tokens_per_s"] == 7
