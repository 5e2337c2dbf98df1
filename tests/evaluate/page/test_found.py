"""What is found in directories, and how they are told to be wrong."""

import json
import re
from pathlib import Path

import pytest

from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.evaluate.report.inputs import find

from ...sdpo.tiny_manifest import manifest
from .shown_runs import STEPS, write_everything, write_likelihood, write_run, write_steps


def test_a_run_with_everything(tmp_path: Path) -> None:
    (found,) = find([write_everything(tmp_path / "night")])
    assert found.label == "night" and found.is_run
    assert found.config["objective"]["beta"] == 0.2
    assert found.model["num_hidden_layers"] == 4
    assert len(found.records) == STEPS + 1 and list(found.layers) == [2]
    assert found.manifest is None
    assert found.evaluation.models == ["base", "trained"]


def test_an_evaluation_by_itself(tmp_path: Path) -> None:
    write_likelihood(tmp_path / "compared", {"base": 0.5})
    (found,) = find([tmp_path / "compared"])
    assert not found.is_run and not found.records
    assert [curves.model for curves in found.evaluation.curves] == ["base"]


def test_an_evaluation_that_went_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_likelihood(elsewhere, {"one": 0.5})
    root = write_run(tmp_path / "run")
    with (root / "config.yaml").open("a") as file:
        file.write(f"evaluate: {{output: {elsewhere}}}\n")
    (found,) = find([root])
    assert found.evaluation.models == ["one"]


def test_a_run_of_several_steps(tmp_path: Path) -> None:
    write_steps(tmp_path / "run", manifest("complete", "pending"))
    (found,) = find([tmp_path / "run"])
    assert found.manifest is not None and len(found.manifest.steps) == 2
    text = (tmp_path / "run" / "manifest.json").read_text()
    (tmp_path / "run" / "manifest.json").write_text(text.replace("merge", "carry"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed"):
        find([tmp_path / "run"])


def test_names_are_the_ends_that_differ(tmp_path: Path) -> None:
    roots = [write_run(tmp_path / a / b) for a, b in (("x", "run"), ("y", "run"), ("y", "other"))]
    write_likelihood(tmp_path / "z" / "evaluation", {"base": 0.5})
    found = find([*roots, tmp_path / "z" / "evaluation"])
    assert [one.label for one in found] == ["x/run", "y/run", "other", "z/evaluation"]


def test_all_wrong_directories_are_named_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error:
        find([tmp_path / "nowhere", tmp_path / "file", run, tmp_path / "x" / ".." / "run"])
    message = str(error.value)
    assert "nowhere: does not exist; name a run's training.output" in message
    assert "file: is a file, not a directory" in message
    with pytest.raises(ConfigError, match="run: is named twice; name it once"):
        find([run, run])


def test_a_directory_with_nothing_to_show(tmp_path: Path) -> None:
    (tmp_path / "evaluation" / "answers").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has nothing to show: no metrics\.jsonl"):
        find([tmp_path])
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no step has been logged and nothing evaluated yet"):
        find([run])


def test_metrics_of_another_program_are_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    (root / "metrics.jsonl").write_text("step loss\n1 0.7\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: has no line with a step"):
        find([root])


def test_a_share_above_1_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "eval_rewards/accuracies": 75.0}) + "\n")
    message = re.escape("has eval_rewards/accuracies = 75 at step 41, which is no share")
    with pytest.raises(ConfigError, match=message):
        find([root])


def test_a_configuration_that_is_no_yaml_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    (root / "config.yaml").write_text("model: {path: x\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2:1: is not YAML"):
        find([root])


def test_a_count_of_pairs_that_is_not_known(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "eval_pairs": None}) + "\n")
    (found,) = find([root])
    assert "eval_pairs" not in found.records[-1]
