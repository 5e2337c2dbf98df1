"""What the manifest remembers, and which changes of a configuration it lets pass."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.manifest import (
    FILE,
    Manifest,
    continued,
    read_manifest,
    write_manifest,
)
from megatron_idpo.storage.sealed import write_sealed

from .tiny_manifest import identity, manifest, record

FOUND = manifest("complete", "training", "pending")
PLANNED = manifest("pending", "pending", "pending")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    learnt = {"objective.layers": {"every": 4}, "lora.rank": None, "objective.beta": 1e-7}
    steps = (record(1, "complete", learnt=learnt, is_removed=True), record(2, "training"))
    for written in (FOUND, manifest(adapters=None, steps=steps, accuracy={"é": 1 / 3})):
        write_manifest(tmp_path, written)
        assert read_manifest(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "missing") is None


@pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.99])
def test_a_byte_that_changed_is_reported(tmp_path: Path, at: float) -> None:
    write_manifest(tmp_path, FOUND)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: has been changed.*another train"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("format_", [0, 2, None])
def test_another_version_is_told_which(tmp_path: Path, format_: int | None) -> None:
    """Its fields may be others."""
    numbered = {} if format_ is None else {"format": format_}
    write_sealed(tmp_path / FILE, {**numbered, **asdict(FOUND), "version": "9.9", "new": 1})
    with pytest.raises(CheckpointError, match=r"manifest\.json: .*megatron-idpo 9\.9; go on with"):
        read_manifest(tmp_path)


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be written"):
        write_manifest(tmp_path / "missing", FOUND)


def test_a_step_goes_from_pending_to_complete() -> None:
    now = manifest("pending", "pending")
    assert now.next_step == 1
    now = now.with_step(1, state="training", start=identity("model"))
    assert now.next_step == 1 and now.step(1).start == identity("model")
    now = now.with_step(1, state="complete", snapshot=identity("snapshot1"))
    assert now.next_step == 2 and now.step(1).start == identity("model")
    assert now.step(2) == manifest("pending", "pending").step(2)
    assert replace(now, steps=()) == manifest(steps=())
    assert now.with_step(2, state="complete").next_step is None


def test_a_run_goes_on_where_it_stands() -> None:
    assert continued(Path("x"), FOUND, PLANNED) == FOUND
    done = manifest("complete", "complete", "complete")
    assert continued(Path("x"), done, PLANNED) == done
    assert continued(Path("x"), PLANNED, PLANNED) == PLANNED


def test_what_has_not_begun_is_as_it_is_planned_now() -> None:
    other = record(3, pairs=7, data=identity("other"), sources={}, learnt={"objective.beta": 9.0})
    for steps in (
        (*PLANNED.steps[:2], other),
        (*PLANNED.steps[:2], other, record(4)),
        PLANNED.steps[:2],
    ):
        message = continued(Path("x"), FOUND, replace(PLANNED, steps=steps))
        assert message.steps == (*FOUND.steps[:2], *steps[2:])


def test_a_source_of_a_begun_step_may_have_another_name() -> None:
    """The report counts by the names of now."""
    renamed = {"moved/easy.jsonl": 900, "moved/hard.jsonl": 100}
    planned = PLANNED.with_step(1, sources=renamed)
    now = continued(Path("x"), FOUND, replace(planned, accuracy=dict.fromkeys(renamed, 0.5)))
    assert now.step(1) == replace(FOUND.step(1), sources=renamed)
    assert set(now.step(1).sources) == set(now.accuracy)


def test_what_tells_no_model_from_another_may_change() -> None:
    changes: dict[str, Any] = {
        "model": "moved/model",
        "accuracy": {"all": 0.5},
        "version": "9.9",
    }
    planned = replace(PLANNED, **changes)
    assert continued(Path("x"), FOUND, planned) == replace(FOUND, **changes)


def step_changed(number: int, **changes: Any) -> Manifest:
    return PLANNED.with_step(number, **changes)


LEARNT = PLANNED.step(1).learnt
REFUSED: dict[str, tuple[Manifest, str]] = {
    "model": (
        replace(PLANNED, model_identity=identity("other")),
        "was begun with another first model (some/model)",
    ),
    "target": (
        replace(PLANNED, target="first"),
        "was begun with sdpo.target = previous, not first",
    ),
    "adapters": (
        replace(PLANNED, adapters="carry"),
        "was begun with sdpo.adapters = merge, not carry",
    ),
    "all weights": (
        replace(PLANNED, adapters=None),
        "was begun with sdpo.adapters = merge, not None",
    ),
    "data of a complete step": (
        step_changed(1, data=identity("other"), pairs=1234),
        "was begun with other pairs in step 1 (1,000, now 1,234)",
    ),
    "data of a step in training": (
        step_changed(2, data=identity("other")),
        "was begun with other pairs in step 2 (2,000, now 2,000)",
    ),
    "a value": (
        step_changed(1, learnt={**LEARNT, "objective.beta": 0.2}),
        "was begun with objective.beta = 0.1 in step 1, not 0.2",
    ),
    "a list": (
        step_changed(2, learnt={**LEARNT, "objective.layers": [2, 3]}),
        "was begun with objective.layers = [2] in step 2, not [2, 3]",
    ),
    "a new name": (
        step_changed(1, learnt={**LEARNT, "lora.rank": 8}),
        "was begun with lora.rank = None in step 1, not 8",
    ),
    "a lost name": (
        step_changed(1, learnt={"objective.beta": 0.1, "objective.layers": [2]}),
        "was begun with model.dtype = bf16 in step 1, not None",
    ),
    "fewer steps": (
        replace(PLANNED, steps=PLANNED.steps[:1]),
        "was begun with 3 steps, of which 2 are begun",
    ),
}


@pytest.mark.parametrize(("planned", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_was_done_otherwise_is_refused(planned: Manifest, reason: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        continued(Path("runs/x"), FOUND, planned)
    (problem,) = raised.value.problems
    pairs = "pairs" in reason
    assert problem.location == f"runs/x/{FILE}"
    assert problem.message == reason
    assert problem.remedy.endswith(", or name another training.output")
    assert problem.remedy.startswith("use the data, seed and sdpo.order" if pairs else "keep it,")


def test_every_difference_is_told_at_once() -> None:
    planned = replace(step_changed(1, learnt={}, data=identity("x")), target="first")
    with pytest.raises(CheckpointError) as raised:
        continued(Path("x"), FOUND, planned)
    assert len(raised.value.problems) == 2 + len(LEARNT)
