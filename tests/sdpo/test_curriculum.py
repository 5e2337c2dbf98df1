"""Scores of the first model, and the assignment of pairs to steps."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_idpo.errors import EXIT_PREEMPTED, CheckpointError, ConfigError, DataError
from megatron_idpo.sdpo.curriculum import Curriculum, remedies_without_cache, write_curriculum
from megatron_idpo.sdpo.split import Easiness

from ..train.run_hooks import stop_after
from ..train.tiny_run import NUM_LAYERS
from .stepped_run import (
    THREE_STEPS,
    Files,
    Outcome,
    cached_logps,
    manifest_of,
    run,
    slice_of,
    stepped_config,
)

pytestmark = pytest.mark.distributed

SCORED = re.compile(r"reference log-probs: \d+ training pairs in")
"""Final line of a scoring pass."""


def start_training(workers: Any, file: str) -> Outcome:
    """A run that is stopped after two optimizer steps of step 1."""
    [outcome] = workers.run(run, 1, file, stop_after(2))
    assert outcome.code == EXIT_PREEMPTED, outcome.printed
    return outcome


def table(output: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(output / "curriculum.parquet").to_pandas()


def two_sources(tiny: Files, directory: Path) -> list[str]:
    """The training pairs in two files, 16 and 8."""
    lines = tiny.train.read_text().splitlines(keepends=True)
    names = [directory / "first.jsonl", directory / "second.jsonl"]
    names[0].write_text("".join(lines[:16]))
    names[1].write_text("".join(lines[16:]))
    return [str(name) for name in names]


def test_first_model_is_scored_once_at_the_layers_of_all_steps(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    """Step 1's reference is copied from these scores bitwise, without another pass."""
    output = tmp_path / "run"
    outcome = start_training(workers, stepped_config(tiny, output, steps=THREE_STEPS))
    first = cached_logps(output / "first_model")
    assert set(first) == {1, 2, 3, NUM_LAYERS}
    assert len(SCORED.findall(outcome.printed)) == 1
    step_1 = cached_logps(output / "step-1" / "reference")
    pairs = table(output).query("step == 1").pair.to_numpy()
    assert set(step_1) == {1, 3, NUM_LAYERS}
    assert all(np.array_equal(step_1[layer], first[layer][pairs]) for layer in step_1)


def test_sources_are_ordered_by_accuracy(tiny: Files, workers: Any, tmp_path: Path) -> None:
    output, sources = tmp_path / "run", two_sources(tiny, tmp_path)
    file = stepped_config(
        tiny,
        output,
        steps=[{}, {}],
        data={"train": sources},
        sdpo={"order": "easy_to_hard"},
        training={"global_batch_pairs": 4},
    )
    start_training(workers, file)
    final = cached_logps(output / "first_model")[NUM_LAYERS].numpy()
    is_right = final[:, 0] > final[:, 1]
    shares = {sources[0]: is_right[:16].mean(), sources[1]: is_right[16:].mean()}
    manifest = manifest_of(output)
    assert manifest.accuracy == pytest.approx(shares)
    easier, harder = sorted(sources, key=lambda name: -shares[name])
    assert [list(step.sources) for step in manifest.steps] == [[easier], [harder]]


def test_pairs_are_ordered_by_margin(tiny: Files, workers: Any, tmp_path: Path) -> None:
    """Per token: every pair of step 1 is at least as easy as any of step 2."""
    output = tmp_path / "run"
    sdpo = {"order": "easy_to_hard", "by": "pair", "measure": "margin", "length_normalised": True}
    start_training(workers, stepped_config(tiny, output, sdpo=sdpo))
    rows = table(output)
    margins = {step: rows[rows.step == step].first_model_margin for step in (1, 2)}
    assert len(margins[1]) == len(margins[2]) == 12
    assert margins[1].min() >= margins[2].max()


@pytest.mark.exhaustive
def test_steps_with_named_sources(tiny: Files, workers: Any, tmp_path: Path) -> None:
    output, sources = tmp_path / "run", two_sources(tiny, tmp_path)
    steps = [{"sources": [2]}, {"sources": [1, 2]}]
    file = stepped_config(
        tiny, output, steps=steps, data={"train": sources}, sdpo={"order": "given"}
    )
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    assert [step.pairs for step in manifest_of(output).steps] == [8, 24]
    assert slice_of(output, 1) == list(range(16, 24)) and slice_of(output, 2) == list(range(24))


def test_invalid_steps_are_reported(tiny: Files, workers: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    steps = [{"fraction": 0.5}, {"fraction": 0.5, "layers": [9]}]
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        workers.run(run, 1, stepped_config(tiny, output, steps=steps))
    with pytest.raises(ConfigError, match=r"needs 2|2 ranks|processes"):
        layouts = [{"fraction": 0.5}, {"fraction": 0.5, "layout": {"tensor": 2}}]
        workers.run(run, 1, stepped_config(tiny, output, steps=layouts))
    assert not (output / "first_model").exists()
    with pytest.raises(DataError, match=r"sdpo\.steps\.1.* gets none of the 24 pairs"):
        fractions = [{"fraction": 0.999}, {"fraction": 0.001}]
        workers.run(run, 1, stepped_config(tiny, output, steps=fractions))


@pytest.mark.exhaustive
def test_path_given_twice_has_two_names(tiny: Files, workers: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    source = {"path": str(tiny.train), "weight": 0.5}
    file = stepped_config(tiny, output, data={"train": [source, source]}, sdpo={"only": 1})
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    names = set(json.loads((output / "manifest.json").read_text())["accuracy"])
    assert names == {str(tiny.train), f"{tiny.train} (2)"}


def test_table_has_a_row_per_pair_and_step(tmp_path: Path) -> None:
    slices = [np.array([0, 3]), np.array([1, 3]), np.array([3])]
    easiness = Easiness(np.array([1.0, 0, 1, 0]), np.array([0.5, -1, 2, -3]))
    source_P = np.array([0, 0, 1, 1])
    write_curriculum(Curriculum(slices, ["a", "b"], source_P, easiness), tmp_path / "curriculum")
    (tmp_path / "curriculum").rename(tmp_path / "curriculum.parquet")
    rows = table(tmp_path)
    assert list(rows.columns[:3]) == ["pair", "source", "step"]
    assert rows.to_numpy().tolist() == [
        [0, "a", 1, 0.5, 1.0],
        [1, "a", 2, -1.0, 0.0],
        [2, "b", 0, 2.0, 1.0],
        [3, "b", 1, -3.0, 0.0],
        [3, "b", 2, -3.0, 0.0],
        [3, "b", 3, -3.0, 0.0],
    ]
    assert slice_of(tmp_path, 1) == [0, 3] and slice_of(tmp_path, 3) == [3]


@pytest.mark.parametrize(
    ("remedy", "expected"),
    [
        ("name another in reference.cache, or delete this one", "delete this one"),
        ("wait for it, or name another directory in reference.cache", "wait for it"),
        ("name another one in reference.cache", "name another training.output"),
        ("free some space", "free some space"),
    ],
)
def test_remedies_do_not_name_reference_cache(remedy: str, expected: str) -> None:
    with pytest.raises(CheckpointError) as raised, remedies_without_cache():
        raise CheckpointError.at("first_model", "is another's", remedy)
    assert str(raised.value) == f"first_model: is another's; {expected}"


def test_scores_of_other_data_are_rejected_with_remedy(
    tiny: Files, workers: Any, tmp_path: Path, first_step: Any
) -> None:
    """The remedy does not name `reference.cache`."""
    output = first_step("merge", tmp_path / "run")
    (output / "manifest.json").unlink()
    shutil.rmtree(output / "snapshots")
    longer = stepped_config(tiny, output, data={"max_length": 64}, sdpo={"only": 1})
    with pytest.raises(
        CheckpointError, match="first_model: cache was made from other inputs"
    ) as raised:
        workers.run(run, 1, longer)
    assert str(raised.value).endswith("; delete it to score again")
