"""What is evaluated and where its results go, from the configuration."""

from pathlib import Path

import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.models import EvalModel, evaluation_output, subjects


def config(tmp_path: Path, text: str) -> RunConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: sft}}\n{text}")
    return load_config(file, required=("model",), optional=("training", "evaluate"))


def finished_run(directory: Path) -> Path:
    (directory / "hf").mkdir(parents=True)
    (directory / "config.yaml").write_text("")
    return directory


def test_models_are_named_paths_adapters_and_runs(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    found = subjects(
        config(
            tmp_path,
            f"evaluate: {{models: {{sft: org/model, dpo: {run}, a: {{path: x, adapter: y}}}}}}",
        )
    )
    assert found == (
        EvalModel("sft", "org/model"),
        EvalModel("dpo", str(run / "hf")),
        EvalModel("a", "x", Path("y")),
    )


def test_without_names_it_is_the_run_before_and_after(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    own = config(tmp_path, f"training: {{output: {run}, global_batch_pairs: 4}}")
    assert subjects(own) == (EvalModel("base", "sft"), EvalModel("trained", str(run / "hf")))
    assert evaluation_output(own) == run / "evaluation"


def test_all_runs_without_a_result_are_reported(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        subjects(
            config(tmp_path, f"evaluate: {{models: {{a: {tmp_path}/one, b: {tmp_path}/two}}}}")
        )
    assert "evaluate.models.a" in str(caught.value) and "evaluate.models.b" in str(caught.value)
    assert "no run has finished there" in str(caught.value)


def test_nothing_to_evaluate_and_no_place_are_reported(tmp_path: Path) -> None:
    bare = config(tmp_path, "")
    with pytest.raises(ConfigError, match=r"evaluate\.models: names no model"):
        subjects(bare)
    with pytest.raises(ConfigError, match=r"evaluate\.output: says no place"):
        evaluation_output(bare)


@pytest.mark.parametrize("name", ["a/b", "..", " x", "-"])
def test_a_name_that_is_no_files_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use letters"):
        config(tmp_path, f"evaluate: {{models: {{'{name}': x}}}}")
