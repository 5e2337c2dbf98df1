"""The metrics file has each step once, also after kills, and no incomplete line is read."""

import json
import math
from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.train.metrics.file import MetricsFile, read_metrics


def write(path: Path, *steps: int, resumed_step: int | None = None, loss: float = 0.5) -> None:
    file = MetricsFile(path, resumed_step=resumed_step)
    for step in steps:
        file.on_log(step, {"epoch": step / 10, "loss": loss})


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_line_is_an_object_with_its_step_first(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    file = MetricsFile(path, resumed_step=None)
    file.on_log(3, {"epoch": 0.25, "loss": 1 / 3})
    # Seen by others at once, before the file is closed.
    assert path.read_text() == '{"step": 3, "epoch": 0.25, "loss": 0.3333333333333333}\n'


def test_nan_and_infinity_are_written_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_step=None)
    file.on_log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None, "c": 1.0}
    (record,) = read_metrics(path)
    assert math.isnan(record["a"]) and math.isnan(record["b"]) and record["c"] == 1.0


def test_resumed_run_replaces_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 10, 20, 30, 40)
    write(path, 30, 40, 50, resumed_step=20, loss=0.1)
    assert steps_in(path) == [10, 20, 30, 40, 50]
    assert [record["loss"] for record in read_metrics(path)] == [0.5, 0.5, 0.1, 0.1, 0.1]
    assert list(tmp_path.iterdir()) == [path]


def test_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 10, 20)
    write(path, 10)
    assert steps_in(path) == [10]


def test_resumed_run_works_without_the_file(tmp_path):
    write(tmp_path / "metrics.jsonl", 30, resumed_step=20)
    assert steps_in(tmp_path / "metrics.jsonl") == [30]


@pytest.mark.parametrize("half", [b'{"step": 20, "lo', b"\xff\x00", b"[1]\n", b'{"loss": 1}\n'])
def test_incomplete_line_is_skipped_and_removed(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    write(path, 10)
    path.write_bytes(path.read_bytes() + half)
    assert [record["step"] for record in read_metrics(path)] == [10]
    write(path, 20, resumed_step=20)
    assert steps_in(path) == [10, 20]


def test_lines_of_a_step_are_merged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_step=None)
    file.on_log(2, {"loss": 1.0})
    file.on_log(0, {"eval_loss": 3.0})
    file.on_log(2, {"eval_loss": 2.0})
    assert read_metrics(path) == [
        {"step": 0, "eval_loss": 3.0},
        {"step": 2, "loss": 1.0, "eval_loss": 2.0},
    ]


def test_path_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"training\.output: cannot write .*file/metrics\.jsonl"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", resumed_step=None)
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.jsonl: No such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_full_disk_is_reported_with_remedy(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_step=None)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left on device; free some space"):
        file.on_log(1, {"loss": 1.0})
