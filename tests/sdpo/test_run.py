"""sDPO runs: start and reference of each step, layouts, resuming."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.load import load_config
from megatron_idpo.errors import EXIT_PREEMPTED, CheckpointError, ConfigError
from megatron_idpo.figures.numbers import decimal
from megatron_idpo.train.metrics.file import read_metrics
from megatron_idpo.train.starts import read_starts

from .. import oracle
from ..train.run_hooks import CountSteps, stop_after
from ..train.tiny_run import NUM_LAYERS, relative_difference
from .stepped_run import (
    EXPORTING,
    Files,
    Outcome,
    cached_logps,
    exported,
    run,
    slice_of,
    snapshots,
    start_checks,
    states,
    stepped_config,
)

pytestmark = pytest.mark.distributed

LOGP_TOLERANCE = 1e-4
"""Of an answer's log-probability in fp32, compared with Transformers. Sums of up to 40 tokens of
about 6 nats have 2e-5 of rounding."""

LAYOUT_TOLERANCE = 1e-5
"""Between layouts, as in `train/test_loop.py`."""


@pytest.mark.parametrize("kind", ["full", "merge", "carry"])
def test_reference_of_step_2_is_the_result_of_step_1(tiny: Files, finished: Any, kind: str) -> None:
    """At every layer, for chosen and rejected; and it differs from the first model."""
    output, outcome = finished(kind)
    cached = cached_logps(output / "step-2" / "reference")
    pairs = tokenized(stepped_config(tiny, output, kind, EXPORTING), slice_of(output, 2))
    theirs = _read(output / "step-1" / "hf", pairs)
    first = _read(tiny.model, pairs)
    assert set(cached) == {1, 3, NUM_LAYERS}
    for layer, logps_P2 in cached.items():
        torch.testing.assert_close(logps_P2, theirs[layer], atol=LOGP_TOLERANCE, rtol=0)
    moved = (first[NUM_LAYERS] - theirs[NUM_LAYERS]).abs().max()
    assert moved > 1000 * LOGP_TOLERANCE, "step 1 must change the model"
    assert start_checks(outcome) == 2


@pytest.mark.parametrize("kind", ["full", "merge", "carry"])
def test_files_of_a_finished_run(finished: Any, kind: str) -> None:
    """Files of a finished run; `hf/` differs from the export of step 1."""
    output, _ = finished(kind)
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    always = {"config.yaml", "manifest.json", "first_model", "snapshots", "step-1", "step-2", "hf"}
    always |= {"curriculum.parquet", "curriculum.md", "curriculum.png"}
    always |= {"metrics.jsonl", "curves.png"}
    assert names == always | ({"adapter"} if kind == "carry" else set())
    assert not (output / "step-1" / "checkpoints").exists()
    assert not (output / "step-2" / "hf").exists()
    assert (output / "step-1" / "adapter").exists() == (kind != "full")
    before = exported(output / "step-1")
    assert relative_difference(exported(output), before) > 1e-3


def test_each_pair_is_in_one_step(tiny: Files, finished: Any) -> None:
    """Each pair in one step; metrics of both steps with continuous step numbers."""
    output, _ = finished("merge")
    first, second = slice_of(output, 1), slice_of(output, 2)
    assert sorted([*first, *second]) == list(range(24)) and len(first) == 12
    assert first != list(range(12)), "pairs are shuffled"
    assert str(tiny.train) in (output / "curriculum.md").read_text()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, 9))
    assert [record["sdpo_step"] for record in records if "loss" in record] == [1] * 4 + [2] * 4


def test_manifest_has_metrics_against_both_references(finished: Any) -> None:
    """Step 1's reference is the first model; step 2's is not."""
    from .stepped_run import manifest_of

    first, second = manifest_of(finished("full")[0]).steps
    name = "eval_rewards/margins"
    assert first.metrics[name] == pytest.approx(first.metrics[f"first_model/{name}"], abs=1e-6)
    assert second.metrics[name] != pytest.approx(second.metrics[f"first_model/{name}"], abs=1e-3)
    records = read_metrics(finished("full")[0] / "step-2" / "metrics.jsonl")
    assert second.metrics[name] == records[-1][name]


def test_cards_have_metrics_against_the_first_model(finished: Any) -> None:
    """The card of the result describes the whole run; that of step 1 says which step it is."""
    from .stepped_run import manifest_of

    output, _ = finished("full")
    name = "first_model/eval_rewards/margins"
    steps = manifest_of(output).steps
    first, last = (decimal(step.metrics[name], "+.3f") for step in steps)
    result, step = (
        (directory / "hf" / "README.md").read_text() for directory in (output, output / "step-1")
    )
    assert "# run\n" in result and "| steps | 2 of 2" in result and f"| {last} |" in result
    assert "# run, step 1\n" in step and "| steps | 1 of 2" in step and f"| {first} |" in step
    assert (output / "hf" / "layers.png").exists()


def test_starts_record_the_held_out_pairs(finished: Any) -> None:
    """By which `report` knows that runs compare; the same in every step."""
    starts = read_starts(finished("full")[0])
    assert len(starts) == 2 and len({start.held_out for start in starts}) == 1
    assert starts[0].held_out is not None


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("merge", {}),
        pytest.param("full", {}, marks=pytest.mark.exhaustive),
        pytest.param("carry", {}, marks=pytest.mark.exhaustive),
        pytest.param("merge", {"sequence_parallel": True}, marks=pytest.mark.exhaustive),
        pytest.param("carry", {"tensor": 1, "context": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_steps_may_have_different_layouts(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, kind: str, more: dict[str, Any]
) -> None:
    """Step 1 on two tensor- or context-parallel ranks, step 2 on two stages, equal one process."""
    steps = [
        {"fraction": 0.5, "layout": {"tensor": 2, **more}},
        {"fraction": 0.5, "layout": {"pipeline": 2}},
    ]
    output = tmp_path / "run"
    sdpo = {"keep_snapshots": "last", "keep_checkpoints": True}
    outcomes = workers.run(run, 2, stepped_config(tiny, output, kind, steps, sdpo=sdpo))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].printed
    difference = relative_difference(exported(output), exported(finished(kind)[0]))
    assert difference <= LAYOUT_TOLERANCE
    assert start_checks(outcomes[0]) == 2
    assert [path.name for path in (output / "snapshots").iterdir()] == ["step-2"]
    assert all((output / f"step-{number}" / "checkpoints").is_dir() for number in (1, 2))


@pytest.mark.parametrize(
    "kind",
    ["merge", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("full", "carry"))],
)
def test_target_first_starts_from_the_first_model(
    tiny: Files, workers: Any, tmp_path: Path, kind: str
) -> None:
    """Its reference is the result of step 1, so start and reference differ and are not checked."""
    output = tmp_path / "run"
    file = stepped_config(tiny, output, kind, sdpo={"target": "first"})
    [(outcome, models_in_memory)] = workers.run(run_counting_models, 1, file)
    assert outcome.code == 0, outcome.printed
    assert models_in_memory == [1, 1], "the models of scoring and of step 1 must be freed"
    assert start_checks(outcome) == 1
    records = read_metrics(output / "step-2" / "metrics.jsonl")
    assert records[0]["eval_rewards/margins"] != 0.0
    cached = cached_logps(output / "step-2" / "reference")
    pairs = tokenized(file, slice_of(output, 2))
    first = _read(tiny.model, pairs)[NUM_LAYERS]
    assert (cached[NUM_LAYERS] - first).abs().max() > 1000 * LOGP_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("carry", "offloaded"),
        pytest.param("full", "resident", marks=pytest.mark.exhaustive),
        pytest.param("merge", "adapter_off", marks=pytest.mark.exhaustive),
    ],
)
def test_live_reference_trains_the_same(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, kind: str, source: str
) -> None:
    file = stepped_config(tiny, tmp_path / "run", kind, EXPORTING, reference={"source": source})
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    assert start_checks(outcome) == 2
    theirs = exported(finished(kind)[0])
    assert relative_difference(exported(tmp_path / "run"), theirs) <= LAYOUT_TOLERANCE


def run_counting_models(file: str) -> tuple[Outcome, list[int]]:
    """A run, and the number of models in memory when each step starts, including garbage."""
    import gc

    from megatron.core.models.gpt import GPTModel

    from megatron_idpo.train import loop

    counts: list[int] = []
    original = loop.train_steps

    def train_steps(*args: Any) -> bool:
        counts.append(alive() - before)
        return original(*args)

    def alive() -> int:
        return sum(isinstance(each, GPTModel) for each in gc.get_objects())

    gc.collect()
    before = alive()  # models of other tests in this worker
    gc.disable()
    try:
        with patch.object(loop, "train_steps", train_steps):
            outcome = run(file)
    finally:
        gc.enable()
    return outcome, counts


@pytest.mark.exhaustive  # test_target_first_starts_from_the_first_model counts them, too
def test_one_model_is_in_memory_during_a_step(tiny: Files, workers: Any, tmp_path: Path) -> None:
    """The model that scored its reference and the model of step 1 have been freed."""
    [(outcome, counts)] = workers.run(
        run_counting_models, 1, stepped_config(tiny, tmp_path / "run")
    )
    assert outcome.code == 0 and counts == [1, 1]


# ---- single steps, signals, errors --------------------------------------------------------------


def test_steps_run_one_at_a_time_equal_a_whole_run(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, first_step: Any
) -> None:
    output = tmp_path / "run"
    file = stepped_config(tiny, output, "merge", EXPORTING, sdpo={"only": 2})
    with pytest.raises(ConfigError, match=r"sdpo\.only: is 2, but step 1 is not complete"):
        workers.run(run, 1, file)
    shutil.rmtree(output)
    first_step("merge", output)
    assert states(output) == ["complete", "pending"]
    assert workers.run(run, 1, file)[0].code == 0
    assert states(output) == ["complete", "complete"]
    assert snapshots(output) == snapshots(finished("merge")[0])
    [again] = workers.run(run, 1, file, CountSteps())
    assert again.code == 0 and again.found["steps"] == []


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.exhaustive), "carry"])
def test_run_stopped_within_a_step_resumes_there(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, kind: str
) -> None:
    output = tmp_path / "run"
    file = stepped_config(tiny, output, kind, EXPORTING)
    [stopped] = workers.run(run, 1, file, stop_after(3), CountSteps())
    assert stopped.code == EXIT_PREEMPTED and stopped.found["steps"] == [1, 2, 3]
    assert states(output) == ["training", "pending"]
    [done] = workers.run(run, 1, file, CountSteps())
    assert done.code == 0 and done.found["steps"] == [4, 1, 2, 3, 4]
    assert snapshots(output) == snapshots(finished(kind)[0])


def cli(arguments: list[str]) -> int:
    from megatron_idpo.cli.main import main

    return main(arguments)


def test_deleted_result_can_be_created_again(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any
) -> None:
    """Nothing is trained; the run prints the command."""
    output = Path(shutil.copytree(finished("full")[0], tmp_path / "run"))
    file = stepped_config(tiny, output, "full", EXPORTING)
    before = exported(output)
    shutil.rmtree(output / "hf")
    [again] = workers.run(run, 1, file, CountSteps())
    assert again.code == 0 and again.found["steps"] == []
    command = again.printed.strip().splitlines()[-1].partition("to create it: ")[2].split()
    assert command[:3] == ["megatron-idpo", "convert", "megatron-to-hf"]
    assert workers.run(cli, 1, command[1:]) == [0]
    assert relative_difference(exported(output), before) == 0.0


def test_deleted_reference_cache_is_scored_again(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, first_step: Any
) -> None:
    """By the model in the manifest; the resumed policy differs from it."""
    output = first_step("merge", tmp_path / "run")
    file = stepped_config(tiny, output, "merge", EXPORTING)
    workers.run(run, 1, file, stop_after(2))
    shutil.rmtree(output / "step-2" / "reference")
    [outcome] = workers.run(run, 1, file, CountSteps())
    assert outcome.code == 0 and outcome.found["steps"] == [3, 4]
    assert snapshots(output) == snapshots(finished("merge")[0])


@pytest.mark.parametrize("victim", ["manifest.json", "snapshot.json", "largest"])
def test_changed_byte_is_reported_with_its_file(
    tiny: Files, workers: Any, tmp_path: Path, first_step: Any, victim: str
) -> None:
    """In the manifest, the snapshot's description or its weights; before step 2 starts."""
    output = first_step("full", tmp_path / "run")
    snapshot = output / "snapshots" / "step-1"
    path = {"manifest.json": output / victim, "snapshot.json": snapshot / victim}.get(victim)
    path = path or max(snapshot.glob("*.distcp"), key=lambda part: part.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has been changed") as raised:
        workers.run(run, 1, stepped_config(tiny, output, "full"))
    assert str(path) in str(raised.value)
    assert not (output / "step-2" / "metrics.jsonl").exists()


def test_changed_settings_are_rejected(
    tiny: Files, workers: Any, tmp_path: Path, first_step: Any
) -> None:
    output = first_step("merge", tmp_path / "run")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": {"seed": 4}}, "step 1: pairs differ"),
        ({"objective": {"loss": "ipo"}}, "step 1.objective.loss was sigmoid, is now ipo"),
        ({"sdpo": {"target": "first"}}, "sdpo.target was previous, is now first"),
        ({"checkpoint": {"resume": "never"}}, "already has a manifest"),
    ]
    for sections, message in changes:
        with pytest.raises((CheckpointError, ConfigError), match=message):
            workers.run(run, 1, stepped_config(tiny, output, **sections))


# ---- log-probabilities by Transformers ----------------------------------------------------------


def tokenized(file: str, indices: list[int]) -> list[oracle.Pair]:
    """Tokens of training pairs of a configuration."""
    from megatron_idpo.cli.train import OPTIONAL, REQUIRED
    from megatron_idpo.data.run_pairs import load_run_pairs

    pairs = load_run_pairs(load_config(file, required=REQUIRED, optional=OPTIONAL)).train
    return [
        (pair.prompt_tokens.tolist(), pair.chosen_tokens.tolist(), pair.rejected_tokens.tolist())
        for pair in map(pairs.__getitem__, indices)
    ]


def _read(model: Path, pairs: list[oracle.Pair]) -> dict[int, Tensor]:
    """Log-probabilities at every layer, [P, 2]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logps = oracle.sequence_logps(loaded, pairs, range(1, NUM_LAYERS + 1))
    return {layer: logps_2P.view(-1, 2) for layer, logps_2P in logps.items()}
