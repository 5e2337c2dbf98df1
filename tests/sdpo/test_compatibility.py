"""Errors before the first model is scored or any file is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError, ConfigError, DataError, UserError

from ..train.run_hooks import stop_after
from ..train.tiny_run import write_config
from .stepped_run import LORA, TWO_STEPS, Files, run, states, stepped_config

pytestmark = pytest.mark.distributed


def files(output: Path) -> dict[str, bytes]:
    """Content of all files below a directory."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def output(first_step: Any, tmp_path: Path) -> Path:
    """The output of a run whose first step is complete."""
    directory: Path = first_step("full", tmp_path / "run")
    return directory


def test_run_without_sdpo_is_rejected_in_the_directory_of_an_sdpo_run(
    tiny: Files, workers: Any, output: Path
) -> None:
    """Also in the directory of a step."""
    before = files(output)
    for directory in (output, output / "step-1"):
        with pytest.raises(ConfigError, match="belongs to an sDPO run"):
            workers.run(run, 1, write_config(tiny, directory))
        directory.with_suffix(".yaml").unlink()
    with pytest.raises(ConfigError, match="belongs to an sDPO run"):
        workers.run(run, 1, str(output / "step-1" / "config.yaml"))
    assert files(output) == before


def test_sdpo_run_is_rejected_in_the_directory_of_another_run(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    workers.run(run, 1, write_config(tiny, output, training={"max_steps": 2}))
    before = files(output)
    with pytest.raises(ConfigError, match=r"no manifest\.json: of a run without sdpo"):
        workers.run(run, 1, stepped_config(tiny, output, "full"))
    assert files(output) == before


def test_lost_manifest_is_rejected(tiny: Files, workers: Any, output: Path) -> None:
    """All steps would be trained again, without a message."""
    (output / "manifest.json").unlink()
    before = files(output)
    with pytest.raises(ConfigError, match=r"snapshots but no manifest\.json.*restore the file"):
        workers.run(run, 1, stepped_config(tiny, output, "full"))
    assert files(output) == before


def test_rejected_start_changes_no_file(tiny: Files, workers: Any, output: Path) -> None:
    before = files(output)
    with pytest.raises(CheckpointError, match="step 1: pairs differ"):
        workers.run(run, 1, stepped_config(tiny, output, "full", data={"seed": 4}))
    assert files(output) == before


EARLY: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "a step's layers": (
        {"sdpo": {"steps": [{}, {"layers": [9]}]}},
        ConfigError,
        r"sdpo\.steps\.1: objective\.layers: layer 9 does not exist",
    ),
    "a step's layout": (
        {"sdpo": {"steps": [{}, {"layout": {"tensor": 2}}]}},
        ConfigError,
        r"sdpo\.steps\.1: layout",
    ),
    "an adapter": ({"lora": {**LORA, "adapter": "nowhere"}}, CheckpointError, "nowhere"),
    "a held-out pair": ({}, DataError, r"held_out\.jsonl:1: up to"),
}


@pytest.mark.parametrize("name", EARLY)
def test_invalid_step_is_reported_before_scoring(
    tiny: Files, workers: Any, tmp_path: Path, name: str
) -> None:
    output, (sections, kind, message) = tmp_path / "run", EARLY[name]
    held_out = tmp_path / "held_out.jsonl"
    answer_words = 90 if kind is DataError else 3
    pair = {"prompt": "a?", "chosen": " b" * answer_words, "rejected": " c" * answer_words}
    held_out.write_text(json.dumps(pair) + "\n")
    with pytest.raises(kind, match=message):
        workers.run(run, 1, stepped_config(tiny, output, data={"eval": str(held_out)}, **sections))
    assert not (output / "first_model").exists()


def test_step_with_too_few_pairs_is_reported_before_step_1(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    output, steps = tmp_path / "run", [{"fraction": 0.9}, {"fraction": 0.1, "epochs": 1}]
    with pytest.raises(DataError, match=r"sdpo\.steps\.1: has 2 pairs in 1 epochs"):
        workers.run(run, 1, stepped_config(tiny, output, steps=steps))
    assert not (output / "step-1").exists() and not (output / "manifest.json").exists()


@pytest.mark.parametrize(
    "source",
    [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("resident", "offloaded")],
)
def test_resuming_a_step_with_another_reference_is_rejected_by_its_checkpoint(
    tiny: Files, workers: Any, tmp_path: Path, source: str
) -> None:
    """Also without manifest and snapshots. The start is the first model in both cases."""
    output = tmp_path / "run"
    common: dict[str, Any] = {"reference": {"source": source}}
    steps = [dict(step) for step in TWO_STEPS]
    sdpo = {"target": "first"}
    one = stepped_config(tiny, output, "full", steps, sdpo={**sdpo, "only": 1}, **common)
    assert workers.run(run, 1, one)[0].code == 0
    file = stepped_config(tiny, output, "full", steps, sdpo=sdpo, **common)
    workers.run(run, 1, file, stop_after(2))
    assert states(output) == ["complete", "training"]
    (output / "manifest.json").unlink()
    shutil.rmtree(output / "snapshots")
    steps[0]["lr"] = 3e-3
    with pytest.raises(CheckpointError, match="the reference differs"):
        workers.run(run, 1, stepped_config(tiny, output, "full", steps, sdpo=sdpo, **common))


def test_resuming_a_step_with_another_reference_is_rejected_by_the_manifest(
    tiny: Files, workers: Any, output: Path
) -> None:
    """As if step 1 had been trained again and the manifest edited."""
    from megatron_idpo.sdpo.manifest import read_manifest, write_manifest

    file = stepped_config(tiny, output, "full")
    workers.run(run, 1, file, stop_after(2))
    assert states(output) == ["complete", "training"]
    manifest = read_manifest(output)
    assert manifest is not None
    write_manifest(output, manifest.with_step(2, reference="f" * 64))
    with pytest.raises(CheckpointError, match="step 2 began with another reference"):
        workers.run(run, 1, file)
