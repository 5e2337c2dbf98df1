"""What is refused before the first model is scored, or before anything is written over."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError, ConfigError, DataError, UserError

from ..train.run_hooks import stop_after
from ..train.tiny_run import write_config
from .stepped_run import LORA, TWO_STEPS, Files, run, states, stepped_config

pytestmark = pytest.mark.distributed


def files(output: Path) -> dict[str, bytes]:
    """Everything below a directory but caches of tokens."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def finished(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two steps; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert workers.run(run, 1, stepped_config(tiny, output, "full"))[0].code == 0
    return output


def test_a_plain_run_in_its_directory(tiny: Files, workers: Any, finished: Path) -> None:
    """Nor in that of a step: what it says there is not what it learnt from."""
    before = files(finished)
    for output in (finished, finished / "step-2"):
        with pytest.raises(ConfigError, match="belongs to a run of several steps"):
            workers.run(run, 1, write_config(tiny, output))
        output.with_suffix(".yaml").unlink()
    with pytest.raises(ConfigError, match="belongs to a run of several steps"):
        workers.run(run, 1, str(finished / "step-2" / "config.yaml"))
    assert files(finished) == before


def test_steps_in_a_plain_runs_directory(tiny: Files, workers: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    workers.run(run, 1, write_config(tiny, output, training={"max_steps": 2}))
    before = files(output)
    with pytest.raises(ConfigError, match=r"no manifest\.json: a run of one step's"):
        workers.run(run, 1, stepped_config(tiny, output, "full"))
    assert files(output) == before


def test_a_start_that_is_refused_changes_nothing(tiny: Files, workers: Any, finished: Path) -> None:
    before = files(finished)
    with pytest.raises(CheckpointError, match="other pairs in step 1"):
        workers.run(run, 1, stepped_config(tiny, finished, "full", data={"seed": 4}))
    assert files(finished) == before


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
def test_what_can_be_known_is_told_before_anything_is_scored(
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


def test_a_step_that_fills_no_batch_is_told_before_step_1(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    output, steps = tmp_path / "run", [{"fraction": 0.9}, {"fraction": 0.1, "epochs": 1}]
    with pytest.raises(DataError, match=r"sdpo\.steps\.1: has 2 pairs in 1 epochs"):
        workers.run(run, 1, stepped_config(tiny, output, steps=steps))
    assert not (output / "step-1").exists() and not (output / "manifest.json").exists()


@pytest.mark.parametrize(
    "source", ["resident", pytest.param("offloaded", marks=pytest.mark.exhaustive)]
)
def test_a_step_does_not_go_on_against_another_reference(
    tiny: Files, workers: Any, tmp_path: Path, source: str
) -> None:
    """Its start is the first model in any case: the manifest alone knew what it learnt against."""
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
    steps[0]["lr"] = 3e-3
    with pytest.raises(CheckpointError, match="belongs to a run with another reference"):
        workers.run(run, 1, stepped_config(tiny, output, "full", steps, sdpo=sdpo, **common))


def test_the_manifest_knows_what_a_step_was_begun_with(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """Step 1 alone was made again meanwhile, by somebody who edited the manifest's state."""
    from megatron_idpo.sdpo.manifest import read_manifest, write_manifest

    output = tmp_path / "run"
    workers.run(run, 1, stepped_config(tiny, output, "full", sdpo={"target": "first", "only": 1}))
    file = stepped_config(tiny, output, "full", sdpo={"target": "first"})
    workers.run(run, 1, file, stop_after(2))
    assert states(output) == ["complete", "training"]
    manifest = read_manifest(output)
    assert manifest is not None
    write_manifest(output, manifest.with_step(2, reference="f" * 64))
    with pytest.raises(CheckpointError, match="step 2 was begun with another reference"):
        workers.run(run, 1, file)
