"""`progress.json`: round trip, damage, other versions, and the check against a resuming run."""

import json
from dataclasses import replace

import pytest

from megatron_idpo.checkpoint.metadata import FILE, Progress, Record, check_same_run
from megatron_idpo.errors import CheckpointError

PROGRESS = Progress(
    step=12,
    data={"consumed_pairs": 96, "seed": 1, "num_pairs": 240},
    data_fingerprint="d" * 64,
    base_model="b" * 64,
    config={"model": {"path": "Modèle"}, "layers": [22]},
    metrics={"loss": float("inf"), "rewards/margins": 1e-300, "eval_loss": 0.1 + 0.2},
    layout={"tensor": 2},
)
RECORD = Record(
    progress=PROGRESS,
    score=0.1,
    metric="eval_loss",
    optimizer_steps=12,
    loss_scale={"scale": 65536.0, "growth_tracker": 3.0},
)


def test_record_round_trips(tmp_path):
    RECORD.write(tmp_path)
    assert Record.read(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("config", "metric"), [({"checkpoint": {"best_metric": "eval_loss"}}, "eval_loss"), ({}, None)]
)
def test_file_of_an_older_version_is_read(tmp_path, config, metric):
    """It has removed fields, and the name of the metric only in the configuration."""
    RECORD.write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    del content["metric"]
    content["progress"] |= {"schedule": {"warmup_steps": 3}, "best": 0.3, "config": config}
    (tmp_path / FILE).write_text(json.dumps(content))
    expected = replace(RECORD, progress=replace(PROGRESS, config=config), metric=metric)
    assert Record.read(tmp_path) == expected


def test_unwritable_directory_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match=r"progress\.json: cannot be written: No such file"):
        RECORD.write(tmp_path / "nowhere")


DAMAGED = {
    "missing": (None, "cannot be read: No such file or directory"),
    "truncated": ('{"format": 1, "prog', "is not valid JSON: "),
    "not an object": ("[]", "is not a JSON object"),
    "no format": ("{}", "is damaged (KeyError: 'format')"),
    "no step": ('{"format": 1, "progress": {}}', "is damaged (TypeError: "),
    "binary": ("\x00", "is not valid JSON: "),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_reported(content, message, tmp_path):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        Record.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / FILE}: {message}")
    assert f"delete {tmp_path} to resume from the checkpoint before it" in str(caught.value)


def test_other_format_is_refused(tmp_path):
    RECORD.write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    content["format"] = 9
    content["progress"]["version"] = "7.0"
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"has format 9 of megatron-idpo 7\.0; .* with version 7\.0"
    ):
        Record.read(tmp_path)


def test_unrelated_changes_are_accepted():
    changed = replace(PROGRESS, config={}, layout={"pipeline": 4}, version="0", step=0, data={})
    assert check_same_run(PROGRESS, changed, "out") == []


def test_other_model_and_data_are_refused():
    other = replace(PROGRESS, base_model="c" * 64, data_fingerprint="")
    location = "out/step-00000012"
    model, data = map(str, check_same_run(PROGRESS, other, location))
    assert model.startswith(f"{location}: the base model (section `model`) differs; resume with")
    assert data.startswith(f"{location}: the data (section `data`) differs; resume with")
