"""`generate` with concurrent writers, full disks and system errors."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.generate.answers import (
    Answer,
    answers_file,
    append_answers,
    read_answers,
    settings_file,
)
from megatron_idpo.evaluate.generate.run import main
from megatron_idpo.evaluate.generate.transformers_engine import TransformersEngine
from megatron_idpo.storage.lock import locked

from .tiny_answers import QUESTIONS, answered, no_model_is_loaded, user, write_config


def test_only_one_process_writes_a_file(model: Path, tmp_path: Path) -> None:
    path = answers_file(tmp_path / "out", "one")
    path.parent.mkdir(parents=True)
    with locked(path.with_name(".one.jsonl.lock")), pytest.raises(ConfigError, match="another"):
        main(write_config(tmp_path, model), [])


def test_answers_with_other_settings_written_meanwhile_are_refused(
    model: Path, tmp_path: Path
) -> None:
    """While the first model generates, another process writes the answers of the second."""
    two = answers_file(tmp_path / "out", "two")
    models = {"one": str(model), "two": str(model)}
    config = write_config(tmp_path, model, evaluate={"models": models})

    def answer(self: Any, first: int, prompts: Any) -> list[list[int]]:
        if not two.exists():
            settings = json.loads(settings_file(answers_file(tmp_path / "out", "one")).read_text())
            settings["sampling"]["temperature"] = 0.7
            settings_file(two).write_text(json.dumps(settings))
            two.write_text(Answer(0, "p:1", user(QUESTIONS[0]), "Theirs.", 3, True).line())
        return [[76, 1] for _ in prompts]

    with (
        patch.object(TransformersEngine, "answer", answer),
        pytest.raises(DataError, match=r"two\.jsonl: sampling\.temperature was 0\.7, is now 0\.3"),
    ):
        main(config, [])
    assert (
        "Theirs." in two.read_text()
        and len(read_answers(answers_file(tmp_path / "out", "one"))) == 5
    )


def test_a_full_disk_is_reported_and_the_file_is_completed_later(
    model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model)
    main(config, [])
    whole = answered(tmp_path)
    path = answers_file(tmp_path / "out", "one")
    path.unlink()
    half = sum(map(len, whole.splitlines(keepends=True)[:2])) + 20

    def append_some(file: Path, answers: Any) -> None:
        with small_files(half):
            append_answers(file, answers)

    with (
        patch("megatron_idpo.evaluate.generate.task.append_answers", append_some),
        pytest.raises(ConfigError, match=r"output: cannot write .*one\.jsonl: No space left"),
    ):
        main(config, [])
    assert path.read_bytes() == whole[:half]
    main(config, [])
    assert answered(tmp_path) == whole


@contextmanager
def small_files(size_bytes: int) -> Iterator[None]:
    """Limits the size of the files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_system_errors_are_reported(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    path = answers_file(tmp_path / "out", "one")
    path.mkdir(parents=True)
    with (
        no_model_is_loaded(),
        pytest.raises(ConfigError, match=r"output: cannot read .*jsonl: Is a dir"),
    ):
        main(config, [])
    path.rmdir()
    path.with_name(".one.jsonl.lock").mkdir()
    with (
        no_model_is_loaded(),
        pytest.raises(ConfigError, match=r"output: cannot lock .*\.lock: .*dir"),
    ):
        main(config, [])
    path.with_name(".one.jsonl.lock").rmdir()
    with (
        patch("fcntl.flock", side_effect=OSError(38, "Function not implemented")),
        pytest.raises(ConfigError, match=r"cannot lock .*\.lock: Function not implemented"),
    ):
        main(config, [])
