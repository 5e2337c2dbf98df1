"""Runs of several steps: what each step starts from and is compared to, in whatever layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.run_config import load_config
from megatron_idpo.errors import EXIT_PREEMPTED, CheckpointError, ConfigError
from megatron_idpo.train.metrics.file import read_metrics

from .. import oracle
from ..train.run_hooks import CountSteps, stop_after
from ..train.tiny_run import NUM_LAYERS, relative_difference
from .stepped_run import (
    THREE_STEPS,
    Files,
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
"""Of an answer's log-probability, ours against Transformers' in fp32, as the issue has it; sums of
up to 40 tokens of about 6 each carry 2e-5 of rounding."""

LAYOUT_TOLERANCE = 1e-5
"""Between layouts, as in `train/test_loop.py`."""

EXPORTING = ({"fraction": 0.5, "export": True}, {"fraction": 0.5})

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(
    tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Any]]:
    """A complete run of two steps of a kind, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def finish(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            output = tmp_path_factory.mktemp(kind) / "run"
            file = stepped_config(tiny, output, kind, EXPORTING)
            [outcome] = workers.run(run, 1, file)
            assert outcome.code == 0, outcome.printed
            made[kind] = output, outcome
        return made[kind]

    return finish


@pytest.mark.parametrize("kind", ["full", "merge", "carry"])
def test_step_2_is_compared_to_step_1s_result_by_transformers(
    tiny: Files, finished: Any, kind: str
) -> None:
    """At every layer that is read, chosen and rejected; and that is not the first model."""
    output, outcome = finished(kind)
    cached = cached_logps(output / "step-2" / "reference")
    pairs = tokenised(stepped_config(tiny, output, kind, EXPORTING), slice_of(output, 2))
    theirs = _read(output / "step-1" / "hf", pairs)
    first = _read(tiny.model, pairs)
    assert set(cached) == {1, 3, NUM_LAYERS}
    for layer, logps_P2 in cached.items():
        torch.testing.assert_close(logps_P2, theirs[layer], atol=LOGP_TOLERANCE, rtol=0)
    moved = (first[NUM_LAYERS] - theirs[NUM_LAYERS]).abs().max()
    assert moved > 1000 * LOGP_TOLERANCE, "step 1 is to change something"
    assert start_checks(outcome) == 2


@pytest.mark.parametrize("kind", ["full", "merge", "carry"])
def test_the_result_is_the_last_steps(finished: Any, kind: str) -> None:
    """In `hf/`, as the last snapshot has it; what else is left, and what is not."""
    output, _ = finished(kind)
    left = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    always = {"config.yaml", "manifest.json", "first_model", "snapshots", "step-1", "step-2", "hf"}
    always |= {"curriculum.parquet", "curriculum.md", "curriculum.png"}
    always |= {"metrics.jsonl", "curves.png"}
    assert left == always | ({"adapter"} if kind == "carry" else set())
    assert not (output / "step-1" / "checkpoints").exists()
    assert not (output / "step-2" / "hf").exists()
    assert (output / "step-1" / "adapter").exists() == (kind != "full")
    before = exported(output / "step-1")
    assert relative_difference(exported(output), before) > 1e-3


def test_what_each_step_learns_from(tiny: Files, finished: Any) -> None:
    """Both halves, no pair twice; and the metrics of both steps, counted on."""
    output, _ = finished("merge")
    first, second = slice_of(output, 1), slice_of(output, 2)
    assert sorted([*first, *second]) == list(range(24)) and len(first) == 12
    assert first != list(range(12)), "they are shuffled"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, 9))
    assert [record["sdpo_step"] for record in records if "loss" in record] == [1] * 4 + [2] * 4


def test_figures_against_both_references(finished: Any) -> None:
    """Step 1's reference is the first model; step 2's is not."""
    from .stepped_run import manifest_of

    one, two = manifest_of(finished("full")[0]).steps
    name = "eval_rewards/margins"
    assert one.metrics[name] == pytest.approx(one.metrics[f"first_model/{name}"], abs=1e-6)
    assert two.metrics[name] != pytest.approx(two.metrics[f"first_model/{name}"], abs=1e-3)
    records = read_metrics(finished("full")[0] / "step-2" / "metrics.jsonl")
    assert two.metrics[name] == records[-1][name]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("merge", {}),
        pytest.param("full", {}, marks=pytest.mark.exhaustive),
        pytest.param("carry", {}, marks=pytest.mark.exhaustive),
        pytest.param("merge", {"sequence_parallel": True}, marks=pytest.mark.exhaustive),
    ],
)
def test_steps_in_different_layouts(
    tiny: Files, workers: Any, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    """Step 1 over two tensor-parallel ranks and step 2 over two stages, as in one process."""
    steps = [
        {"fraction": 0.5, "layout": {"tensor": 2, **more}},
        {"fraction": 0.5, "layout": {"pipeline": 2}},
    ]
    [one] = workers.run(run, 1, stepped_config(tiny, tmp_path / "one", kind))
    two = workers.run(run, 2, stepped_config(tiny, tmp_path / "two", kind, steps))
    assert [each.code for each in (one, *two)] == [0, 0, 0], two[0].printed
    difference = relative_difference(exported(tmp_path / "two"), exported(tmp_path / "one"))
    assert difference <= LAYOUT_TOLERANCE
    assert start_checks(two[0]) == 2


@pytest.mark.parametrize(
    "kind",
    ["merge", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("full", "carry"))],
)
def test_a_target_that_starts_from_the_first_model(
    tiny: Files, workers: Any, tmp_path: Path, kind: str
) -> None:
    """Its reference is the step before, so that they begin unequal, and nothing is checked."""
    output = tmp_path / "run"
    file = stepped_config(tiny, output, kind, sdpo={"target": "first"})
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    assert start_checks(outcome) == 1
    records = read_metrics(output / "step-2" / "metrics.jsonl")
    assert records[0]["eval_rewards/margins"] != 0.0
    cached = cached_logps(output / "step-2" / "reference")
    pairs = tokenised(file, slice_of(output, 2))
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
def test_other_sources_of_the_reference_learn_the_same(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any, kind: str, source: str
) -> None:
    file = stepped_config(tiny, tmp_path / "run", kind, EXPORTING, reference={"source": source})
    [outcome] = workers.run(run, 1, file)
    assert outcome.code == 0, outcome.printed
    assert start_checks(outcome) == 2
    theirs = exported(finished(kind)[0])
    assert relative_difference(exported(tmp_path / "run"), theirs) <= LAYOUT_TOLERANCE


def models_alive(file: str) -> list[int]:
    """How many more chunks are in memory when each step begins, garbage included."""
    import gc

    from megatron.core.models.gpt import GPTModel

    from megatron_idpo.train import loop

    found: list[int] = []
    ordinary = loop.take_steps

    def take_steps(*args: Any) -> int:
        found.append(alive() - before)
        return ordinary(*args)

    def alive() -> int:
        return sum(isinstance(one, GPTModel) for one in gc.get_objects())

    gc.collect()
    before = alive()  # of other tests in the same worker
    gc.disable()
    try:
        with patch.object(loop, "take_steps", take_steps):
            assert run(file).code == 0
    finally:
        gc.enable()
    return found


@pytest.mark.parametrize(
    "target", [pytest.param("previous", marks=pytest.mark.exhaustive), "first"]
)
def test_a_step_has_one_model_in_memory(
    tiny: Files, workers: Any, tmp_path: Path, target: str
) -> None:
    """Whatever scored its reference, and the step before, are gone."""
    file = stepped_config(tiny, tmp_path / "run", sdpo={"target": target})
    assert workers.run(models_alive, 1, file) == [[1, 1]]


# ---- one step, a signal, what is refused --------------------------------------------------------


def test_one_step_at_a_time(tiny: Files, workers: Any, tmp_path: Path) -> None:
    """Each by a command of its own, as one command would; not before its turn."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    [outcome] = workers.run(run, 1, stepped_config(tiny, whole, steps=THREE_STEPS))
    assert outcome.code == 0

    def one(number: int) -> str:
        return stepped_config(tiny, parts, steps=THREE_STEPS, sdpo={"only": number})

    with pytest.raises(ConfigError, match=r"sdpo\.only: is 2, but step 1 is not complete"):
        workers.run(run, 1, one(2))
    for number in (1, 2, 3):
        assert workers.run(run, 1, one(number))[0].code == 0
        assert states(parts) == ["complete"] * number + ["pending"] * (3 - number)
    assert snapshots(parts) == snapshots(whole)
    [again] = workers.run(run, 1, one(2), CountSteps())
    assert again.code == 0 and again.found["steps"] == []


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.exhaustive), "carry"])
def test_stopped_in_a_step_it_goes_on_there(
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


def cli(words: list[str]) -> int:
    from megatron_idpo.cli.main import main

    return main(words)


def test_a_result_that_is_not_there_any_more(tiny: Files, workers: Any, tmp_path: Path) -> None:
    """All is complete: nothing is trained, and how to make it again is told."""
    output = tmp_path / "run"
    file = stepped_config(tiny, output, "full")
    assert workers.run(run, 1, file)[0].code == 0
    before = exported(output)
    shutil.rmtree(output / "hf")
    [again] = workers.run(run, 1, file, CountSteps())
    assert again.code == 0 and again.found["steps"] == []
    command = again.printed.strip().splitlines()[-1].partition("to make it: ")[2].split()
    assert command[:3] == ["megatron-idpo", "convert", "megatron-to-hf"]
    assert workers.run(cli, 1, command[1:]) == [0]
    assert relative_difference(exported(output), before) == 0.0


def test_a_steps_reference_that_is_lost_is_scored_again(
    tiny: Files, workers: Any, tmp_path: Path, finished: Any
) -> None:
    """By the model that the manifest names; the policy has left it, and is not asked."""
    output = tmp_path / "run"
    workers.run(run, 1, stepped_config(tiny, output, "merge", EXPORTING, sdpo={"only": 1}))
    file = stepped_config(tiny, output, "merge", EXPORTING)
    workers.run(run, 1, file, stop_after(2))
    shutil.rmtree(output / "step-2" / "reference")
    [outcome] = workers.run(run, 1, file, CountSteps())
    assert outcome.code == 0 and outcome.found["steps"] == [3, 4]
    assert snapshots(output) == snapshots(finished("merge")[0])


def test_older_snapshots_go_where_only_the_last_is_wanted(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    sdpo = {"keep_snapshots": "last", "keep_checkpoints": True}
    file = stepped_config(tiny, output, "full", THREE_STEPS, sdpo=sdpo)
    assert workers.run(run, 1, file)[0].code == 0
    assert [path.name for path in (output / "snapshots").iterdir()] == ["step-3"]
    assert all((output / f"step-{number}" / "checkpoints").is_dir() for number in (1, 2, 3))


@pytest.mark.parametrize("victim", ["manifest.json", "snapshot.json", "largest"])
def test_a_changed_byte_is_refused_and_named(
    tiny: Files, workers: Any, tmp_path: Path, victim: str
) -> None:
    """Of the manifest, of what a snapshot says of itself, of its weights: before step 2 begins."""
    output = tmp_path / "run"
    file = stepped_config(tiny, output, "full", sdpo={"only": 1})
    assert workers.run(run, 1, file)[0].code == 0
    snapshot = output / "snapshots" / "step-1"
    path = {"manifest.json": output / victim, "snapshot.json": snapshot / victim}.get(victim)
    path = path or max(snapshot.glob("*.distcp"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has been changed") as raised:
        workers.run(run, 1, stepped_config(tiny, output, "full"))
    assert str(path) in str(raised.value)
    assert not (output / "step-2" / "metrics.jsonl").exists()


def test_another_run_in_the_same_directory_is_refused(
    tiny: Files, workers: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert workers.run(run, 1, stepped_config(tiny, output, sdpo={"only": 1}))[0].code == 0
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": {"seed": 4}}, "other pairs in step 1"),
        ({"objective": {"loss": "ipo"}}, "objective.loss = sigmoid in step 1, not ipo"),
        ({"sdpo": {"target": "first"}}, "sdpo.target = previous, not first"),
        ({"checkpoint": {"resume": "never"}}, "has a manifest already"),
    ]
    for sections, message in changes:
        with pytest.raises((CheckpointError, ConfigError), match=message):
            workers.run(run, 1, stepped_config(tiny, output, **sections))


# ---- reading by Transformers --------------------------------------------------------------------


def tokenised(file: str, chosen: list[int]) -> list[oracle.Pair]:
    """Training pairs of a configuration as the package tokenises them."""
    from megatron_idpo.cli.train import OPTIONAL, REQUIRED
    from megatron_idpo.data.run_pairs import load_run_pairs

    pairs = load_run_pairs(load_config(file, required=REQUIRED, optional=OPTIONAL)).train
    found = (pairs[index] for index in chosen)
    return [
        (
            one.prompt_tokens.tolist(),
            one.chosen_tokens.tolist(),
            one.rejected_tokens.tolist(),
        )
        for one in found
    ]


def _read(model: Path, pairs: list[oracle.Pair]) -> dict[int, Tensor]:
    """Every layer's log-probabilities, [P, 2]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = oracle.sequence_logps(loaded, pairs, range(1, NUM_LAYERS + 1))
    return {layer: logps_2P.view(-1, 2) for layer, logps_2P in found.items()}
