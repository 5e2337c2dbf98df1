"""Reading runs and evaluations; errors of unusable directories."""

import json
import re
from pathlib import Path

import pytest

from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.evaluate.report.inputs import read_runs
from tests.sdpo.tiny_manifest import manifest

from .example_runs import STEPS, write_everything, write_likelihood, write_run, write_steps


def test_run_with_all_evaluations(tmp_path: Path) -> None:
    (found,) = read_runs([write_everything(tmp_path / "night")])
    assert found.label == "night"
    assert found.config["objective"]["beta"] == 0.2
    assert found.model["num_hidden_layers"] == 4
    assert len(found.records) == STEPS + 1 and list(found.layers) == [2]
    assert found.manifest is None
    assert found.evaluation.models == ["base", "trained"]


def test_evaluation_without_a_run(tmp_path: Path) -> None:
    write_likelihood(tmp_path / "compared", {"base": 0.5})
    (found,) = read_runs([tmp_path / "compared"])
    assert not found.config and not found.records
    assert list(found.evaluation.curves) == ["base"]


def test_evaluation_in_another_directory(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_likelihood(elsewhere, {"one": 0.5})
    root = write_run(tmp_path / "run")
    with (root / "config.yaml").open("a") as file:
        file.write(f"evaluate: {{output: {elsewhere}}}\n")
    (found,) = read_runs([root])
    assert found.evaluation.models == ["one"]


def test_changed_manifest_of_an_sdpo_run_is_reported(tmp_path: Path) -> None:
    write_steps(tmp_path / "run", manifest("complete", "pending"))
    (found,) = read_runs([tmp_path / "run"])
    assert found.manifest is not None and len(found.manifest.steps) == 2
    text = (tmp_path / "run" / "manifest.json").read_text()
    (tmp_path / "run" / "manifest.json").write_text(text.replace("merge", "carry"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed"):
        read_runs([tmp_path / "run"])


def test_labels_are_the_path_ends_that_differ(tmp_path: Path) -> None:
    roots = [write_run(tmp_path / a / b) for a, b in (("x", "run"), ("y", "run"), ("y", "other"))]
    write_likelihood(tmp_path / "z" / "evaluation", {"base": 0.5})
    found = read_runs([*roots, tmp_path / "z" / "evaluation"])
    assert [one.label for one in found] == ["x/run", "y/run", "y/other", "z/evaluation"]


def test_all_unusable_directories_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error:
        read_runs([tmp_path / "nowhere", tmp_path / "file", run, tmp_path / "x" / ".." / "run"])
    message = str(error.value)
    assert "nowhere: is not a directory; name the training.output of a run" in message
    assert "file: is not a directory" in message
    with pytest.raises(ConfigError, match="run: names a directory twice"):
        read_runs([run, run])


def test_directory_with_nothing_to_show_is_reported(tmp_path: Path) -> None:
    (tmp_path / "evaluation" / "answers").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has nothing to show: no steps in metrics\.jsonl"):
        read_runs([tmp_path])
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has nothing to show"):
        read_runs([run])


def test_file_without_metrics_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    (root / "metrics.jsonl").write_text("step loss\n1 0.7\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: has no line with a step"):
        read_runs([root])


def test_accuracy_above_1_is_reported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "eval_rewards/accuracies": 75.0}) + "\n")
    message = re.escape("has eval_rewards/accuracies = 75 at step 41, not within 0 and 1")
    with pytest.raises(ConfigError, match=message):
        read_runs([root])


def test_invalid_yaml_is_reported_with_its_line(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    (root / "config.yaml").write_text("model: {path: x\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2:1: is not YAML"):
        read_runs([root])


def test_unknown_number_of_pairs_is_left_out(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "eval_pairs": None}) + "\n")
    (found,) = read_runs([root])
    assert "eval_pairs" not in found.records[-1]
