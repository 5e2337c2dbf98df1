"""The manifest: reading, writing, and comparison with the current configuration."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.manifest import (
    FILE,
    Manifest,
    merge_manifests,
    read_manifest,
    write_manifest,
)
from megatron_idpo.storage.sealed import write_sealed

from .tiny_manifest import identity, manifest, record

SAVED = manifest("complete", "training", "pending")
PLANNED = manifest("pending", "pending", "pending")


def test_written_manifest_is_read_back(tmp_path: Path) -> None:
    learnt = {"objective.layers": {"every": 4}, "lora.rank": None, "objective.beta": 1e-7}
    steps = (record(1, "complete", learnt=learnt, is_removed=True), record(2, "training"))
    for written in (SAVED, manifest(adapters=None, steps=steps, accuracy={"é": 1 / 3})):
        write_manifest(tmp_path, written)
        assert read_manifest(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_missing_manifest_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "missing") is None


@pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.99])
def test_changed_byte_is_reported(tmp_path: Path, at: float) -> None:
    write_manifest(tmp_path, SAVED)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed.*another train"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("format_", [0, 2, None])
def test_manifest_of_another_version_is_reported(tmp_path: Path, format_: int | None) -> None:
    """Its fields may differ."""
    numbered = {} if format_ is None else {"format": format_}
    write_sealed(tmp_path / FILE, {**numbered, **asdict(SAVED), "version": "9.9", "new": 1})
    with pytest.raises(CheckpointError, match=r"manifest\.json: .*megatron-idpo 9\.9; resume with"):
        read_manifest(tmp_path)


def test_path_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be written"):
        write_manifest(tmp_path / "missing", SAVED)


def test_states_of_a_step() -> None:
    now = manifest("pending", "pending")
    assert now.next_step == 1
    now = now.with_step(1, state="training", start=identity("model"))
    assert now.next_step == 1 and now.step(1).start == identity("model")
    now = now.with_step(1, state="complete", snapshot=identity("snapshot1"))
    assert now.next_step == 2 and now.step(1).start == identity("model")
    assert now.step(2) == manifest("pending", "pending").step(2)
    assert replace(now, steps=()) == manifest(steps=())
    assert now.with_step(2, state="complete").next_step is None


def test_saved_manifest_is_kept() -> None:
    assert merge_manifests(Path("x"), SAVED, PLANNED) == SAVED
    done = manifest("complete", "complete", "complete")
    assert merge_manifests(Path("x"), done, PLANNED) == done
    assert merge_manifests(Path("x"), PLANNED, PLANNED) == PLANNED


def test_pending_steps_are_replaced_by_the_plan() -> None:
    other = record(3, pairs=7, data=identity("other"), sources={}, learnt={"objective.beta": 9.0})
    for steps in (
        (*PLANNED.steps[:2], other),
        (*PLANNED.steps[:2], other, record(4)),
        PLANNED.steps[:2],
    ):
        merged = merge_manifests(Path("x"), SAVED, replace(PLANNED, steps=steps))
        assert merged.steps == (*SAVED.steps[:2], *steps[2:])


def test_source_may_be_renamed() -> None:
    """The current names are used."""
    renamed = {"moved/easy.jsonl": 900, "moved/hard.jsonl": 100}
    planned = PLANNED.with_step(1, sources=renamed)
    merged = merge_manifests(
        Path("x"), SAVED, replace(planned, accuracy=dict.fromkeys(renamed, 0.5))
    )
    assert merged.step(1) == replace(SAVED.step(1), sources=renamed)
    assert set(merged.step(1).sources) == set(merged.accuracy)


def test_path_accuracy_and_version_may_change() -> None:
    changes: dict[str, Any] = {"model": "moved/model", "accuracy": {"all": 0.5}, "version": "9.9"}
    planned = replace(PLANNED, **changes)
    assert merge_manifests(Path("x"), SAVED, planned) == replace(SAVED, **changes)


def step_changed(number: int, **changes: Any) -> Manifest:
    return PLANNED.with_step(number, **changes)


LEARNED = PLANNED.step(1).learnt
CHANGED: dict[str, tuple[Manifest, str]] = {
    "model": (replace(PLANNED, model_identity="0" * 64), "the first model (some/model) differs"),
    "target": (replace(PLANNED, target="first"), "sdpo.target was previous, is now first"),
    "adapters": (replace(PLANNED, adapters="carry"), "sdpo.adapters was merge, is now carry"),
    "all weights": (replace(PLANNED, adapters=None), "sdpo.adapters was merge, is now not set"),
    "data of a complete step": (
        step_changed(1, data=identity("other"), pairs=1234),
        "step 1: pairs differ (1,000, now 1,234)",
    ),
    "data of a step in training": (
        step_changed(2, data=identity("other")),
        "step 2: pairs differ (2,000, now 2,000)",
    ),
    "a value": (
        step_changed(1, learnt={**LEARNED, "objective.beta": 0.2}),
        "step 1.objective.beta was 0.1, is now 0.2",
    ),
    "a list": (
        step_changed(2, learnt={**LEARNED, "objective.layers": [2, 3]}),
        "step 2.objective.layers was [2], is now [2, 3]",
    ),
    "a new name": (
        step_changed(1, learnt={**LEARNED, "lora.rank": 8}),
        "step 1.lora.rank was not set, is now 8",
    ),
    "a lost name": (
        step_changed(1, learnt={"objective.beta": 0.1, "objective.layers": [2]}),
        "step 1.model.dtype was bf16, is now not set",
    ),
    "fewer steps": (
        replace(PLANNED, steps=PLANNED.steps[:1]),
        "2 steps have begun, but 1 are configured",
    ),
}


@pytest.mark.parametrize(("planned", "reason"), CHANGED.values(), ids=CHANGED)
def test_changed_input_of_a_begun_step_is_reported(planned: Manifest, reason: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        merge_manifests(Path("runs/x"), SAVED, planned)
    (problem,) = raised.value.problems
    pairs = "pairs" in reason
    assert problem.location == f"runs/x/{FILE}"
    assert problem.message == reason
    assert problem.remedy.endswith(", or name another training.output")
    assert problem.remedy.startswith("use the data, seed and sdpo.order" if pairs else "keep it,")


def test_all_differences_are_reported_at_once() -> None:
    planned = replace(step_changed(1, learnt={}, data=identity("x")), target="first")
    with pytest.raises(CheckpointError) as raised:
        merge_manifests(Path("x"), SAVED, planned)
    assert len(raised.value.problems) == 2 + len(LEARNED)
