"""Models of an evaluation, and its result files."""

from pathlib import Path

import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.models import (
    EvalModel,
    check_writable,
    eval_models,
    evaluation_output,
    single_writer,
    write_result,
)


def config(tmp_path: Path, text: str) -> RunConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: sft}}\n{text}")
    return load_config(file, required=("model",), optional=("training", "evaluate"))


def finished_run(directory: Path) -> Path:
    (directory / "hf").mkdir(parents=True)
    (directory / "config.yaml").write_text("")
    return directory


def test_models_are_paths_adapters_and_runs(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    models = eval_models(
        config(
            tmp_path,
            f"evaluate: {{models: {{sft: org/model, dpo: {run}, a: {{path: x, adapter: y}}}}}}",
        )
    )
    assert models == (
        EvalModel("sft", "org/model"),
        EvalModel("dpo", str(run / "hf")),
        EvalModel("a", "x", Path("y")),
    )


def test_the_default_is_the_run_before_and_after_training(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    run_config = config(tmp_path, f"training: {{output: {run}, global_batch_pairs: 4}}")
    assert eval_models(run_config) == (
        EvalModel("base", "sft"),
        EvalModel("trained", str(run / "hf")),
    )
    assert evaluation_output(run_config) == run / "evaluation"


@pytest.mark.parametrize("file", ["config.yaml", ".lock"])
def test_an_unfinished_run_is_reported(tmp_path: Path, file: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / file).write_text("")
    message = r"evaluate\.models\.a: .* has no hf/: the run has not finished"
    with pytest.raises(ConfigError, match=message):
        eval_models(config(tmp_path, f"evaluate: {{models: {{a: {tmp_path}/one}}}}"))


def test_missing_models_and_output_are_reported(tmp_path: Path) -> None:
    bare = config(tmp_path, "")
    with pytest.raises(ConfigError, match=r"evaluate\.models: names no model"):
        eval_models(bare)
    with pytest.raises(ConfigError, match=r"evaluate\.output: is not set"):
        evaluation_output(bare)


@pytest.mark.parametrize("name", ["a/b", "..", " x", "-"])
def test_a_name_that_cannot_be_a_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="should match pattern"):
        config(tmp_path, f"evaluate: {{models: {{'{name}': x}}}}")


def test_a_result_file_is_created_with_its_directory_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "advice.md"
    for text in ("first", "änderung"):
        write_result(path, text)
        assert path.read_text("utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["advice.md"]


def test_a_failed_write_keeps_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "advice.md"
    write_result(path, "first")
    monkeypatch.setattr("os.replace", disk_is_full)
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot write .*No space left"):
        write_result(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unusable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^evaluate\.output: cannot create .*file/new: "):
        check_writable(tmp_path / "file" / "new")


def test_a_file_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "verdicts.jsonl"
    for _ in range(2):
        with single_writer(path):
            message = rf"^evaluate\.output: {path} is being written by another process; wait"
            with pytest.raises(ConfigError, match=message), single_writer(path):
                pass
    (tmp_path / "file").touch()
    message = r"^evaluate\.output: cannot lock .*file/\.one\.lock: "
    with pytest.raises(ConfigError, match=message), single_writer(tmp_path / "file" / "one"):
        pass
