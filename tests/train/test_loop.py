"""Whole runs: equal in every layout, and their exports.

Equality with the oracle is tested in `test_loop_oracle.py`, resuming in `test_loop_resume.py`,
errors in `test_loop_errors.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.train.metrics.file import Record, read_metrics
from megatron_idpo.train.starts import read_starts
from tests import oracle

from .run_hooks import ReadActivities, ReadTrained
from .tiny_run import (
    BATCH_PAIRS,
    HELD_OUT,
    LAYERS,
    LORA,
    NUM_LAYERS,
    PAIRS,
    STEPS,
    Files,
    Outcome,
    exported,
    relative_difference,
    run,
    together,
    write_config,
)

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
"""Of losses (about 0.7), norms (about 1), and of weights in units of a tensor's root mean square:
fp32; Adam with eps 1e-4 does not amplify its rounding. Measured: 2e-6."""

LOGP_TOLERANCE = 1e-4
"""Of log-probabilities of about -100, between Transformers' kernels and ours."""

CLIP = 0.5
"""Below the gradient norms of the first steps."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
    "context": (2, {"context": 2}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tensor-pipeline": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "pipeline-data": (4, {"pipeline": 2}),
    "context-pipeline-data": (8, {"pipeline": 2, "context": 2}),
    "context-4": (4, {"context": 4}),
    "context-sequence": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
}
"""Processes and the section `layout`."""

RECOMPUTED = {"context-sequence", "context-pipeline-data"}
"""Layouts of long rows: layers are recomputed, and their inputs are kept in the host's memory."""


def recompute_in(layout: str) -> dict[str, Any]:
    """Fields of `training`."""
    return {"recompute": "full", "offload_activations": True} if layout in RECOMPUTED else {}


TRAINED: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": LORA}}


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended."""

    output: Path
    outcomes: list[Outcome]

    @property
    def records(self) -> list[Record]:
        return read_metrics(self.output / "metrics.jsonl")

    def steps(self, name: str) -> list[float]:
        """A metric, for every step that has it."""
        return [record[name] for record in self.records if name in record]


@pytest.fixture(scope="module")
def finished(
    tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], FinishedRun]:
    """Trains in a layout; every run is shared by the tests."""
    known: dict[tuple[str, str], FinishedRun] = {}

    def train(trained: str, layout: str) -> FinishedRun:
        if (trained, layout) not in known:
            world_size, section = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("runs") / "run"
            file = write_config(
                tiny,
                output,
                layout=section,
                optimizer={"clip_grad": CLIP},
                data={"eval": str(tiny.held_out)},
                training={"eval_every_steps": 4, **recompute_in(layout)},
                **TRAINED[trained],
            )
            draw_figures = (trained, layout) == ("full", "one")
            outcomes = workers.run(run, world_size, file, ReadTrained(), draw_figures=draw_figures)
            assert [outcome.code for outcome in outcomes] == [0] * world_size
            known[trained, layout] = FinishedRun(output, outcomes)
        return known[trained, layout]

    return train


@pytest.mark.parametrize(
    ("trained", "layout"),
    [
        ("full", "sequence"),
        ("full", "pipeline"),
        ("lora", "tensor"),
        ("lora", "context-sequence"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                ("lora", "context"),
                ("full", "context-sequence"),
                ("full", "context"),
                ("full", "context-pipeline-data"),
                ("lora", "context-pipeline-data"),
                ("full", "data"),
                ("full", "tensor"),
                ("lora", "pipeline"),
                ("full", "interleaved"),
                ("full", "tensor-pipeline"),
                ("full", "pipeline-data"),
                ("lora", "sequence"),
                ("lora", "data"),
                ("lora", "interleaved"),
                ("lora", "tensor-pipeline"),
                ("lora", "pipeline-data"),
            ]
        ),
    ],
)
def test_every_layout_trains_the_same(finished, trained, layout):
    one, other = finished(trained, "one"), finished(trained, layout)
    names = ("loss", "final_loss", "layer_1/loss", "layer_3/loss", "grad_norm", "rewards/margins")
    for name in (*names, "eval_loss", "eval_layer_1/rewards/margins"):
        expected = one.steps(name)
        assert len(expected) == (3 if name.startswith("eval_") else STEPS)
        assert other.steps(name) == pytest.approx(expected, abs=TOLERANCE), name
    assert one.steps("loss")[-1] < 0.67, "the loss must change"
    assert max(one.steps("grad_norm")) > CLIP, "some steps must be clipped"
    assert relative_difference(exported(other.output), exported(one.output)) <= TOLERANCE


@pytest.mark.parametrize("trained", TRAINED)
def test_reference_at_the_final_layer_reaches_every_stage(tiny, workers, tmp_path, trained):
    """The stages of tapped layers do not compute it themselves."""
    losses = []
    cache = {"source": "cache"}
    for name, reference in (("one", {}), ("pipeline", {}), ("pipeline", cache)):
        processes, section = LAYOUTS[name]
        output = tmp_path / f"{name} {len(losses)}"
        file = write_config(
            tiny,
            output,
            reference=reference,
            objective={"reference_layer": "final"},
            training={"max_steps": 3, "export": False},
            layout=section,
            **TRAINED[trained],
        )
        workers.run(run, processes, file)
        done = FinishedRun(output, [])
        losses.append([*done.steps("layer_1/loss"), *done.steps("final_loss")])
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)
    assert losses[2] == pytest.approx(losses[0], abs=TOLERANCE)
    assert losses[0][0] != pytest.approx(0.693147, abs=0.01)


@pytest.mark.parametrize(("trained", "layout"), [("full", "pipeline"), ("lora", "tensor")])
def test_logged_steps_learning_rates_and_epochs(finished, trained, layout):
    records = finished(trained, layout).records
    assert [int(record["step"]) for record in records] == list(range(STEPS + 1))
    rising, falling = [0.0, 0.5], [0.5 * (1 + math_cos(n / 6)) for n in range(6)]
    lrs = [1e-2 * share for share in (*rising, *falling)]
    assert [r["learning_rate"] for r in records[1:]] == pytest.approx(lrs)
    assert [r["epoch"] for r in records[1:]] == [BATCH_PAIRS * n / PAIRS for n in range(1, 9)]
    evaluated = [int(r["step"]) for r in records if r.get("eval_pairs") == HELD_OUT]
    assert evaluated == [0, 4, STEPS]


def math_cos(share: float) -> float:
    """cos(π · share)."""
    return float(torch.cos(torch.tensor(torch.pi * share, dtype=torch.float64)))


# ---- exports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "layout"),
    [
        ("full", "pipeline"),
        ("lora", "tensor"),
        pytest.param("full", "tensor-pipeline", marks=pytest.mark.exhaustive),
        pytest.param("lora", "tensor-pipeline", marks=pytest.mark.exhaustive),
    ],
)
def test_exported_model_equals_the_trained_one(finished, pairs, trained, layout):
    done = finished(trained, layout)
    ours = _by_layer(together(done.outcomes, "logps"))
    _same_logps(ours, _read(_hf(done.output / "hf"), pairs))


def test_exported_adapter_equals_the_trained_one(finished, pairs, tiny):
    from peft import PeftModel

    done = finished("lora", "tensor")
    base = _hf(tiny.model)
    before = _read(base, pairs)[NUM_LAYERS]
    adapted = PeftModel.from_pretrained(base, done.output / "adapter").get_base_model().eval()
    theirs = _read(adapted, pairs)
    _same_logps(_by_layer(together(done.outcomes, "logps")), theirs)
    assert (theirs[NUM_LAYERS] - before).abs().max() > 1, "training must change the model"


def test_exported_model_generates(finished):
    from transformers import AutoTokenizer

    directory = finished("full", "pipeline").output / "hf"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("abc?", return_tensors="pt", return_token_type_ids=False)
    answer = _hf(directory).generate(**inputs, max_new_tokens=4, pad_token_id=0)
    assert tokenizer.decode(answer[0]).startswith("abc?")


def test_files_of_a_finished_run(finished):
    for trained, more in (("full", set()), ("lora", {"adapter"})):
        output = finished(trained, "one").output
        names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
        files = {"config.yaml", "curves.png", "metrics.jsonl", "starts.jsonl"}
        assert names == files | {"checkpoints", "hf"} | more
        (start,) = read_starts(output)
        assert (start.step, start.total_steps, start.processes) == (0, 8, 1)
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000008"]
        resolved = load_config(output / "config.yaml", required=REQUIRED, optional=OPTIONAL)
        assert resolved.training.output == str(output) and resolved.objective.layers == LAYERS
        printed = finished(trained, "one").outcomes[0].printed
        assert "start check passed" in printed and str(output / "hf") in printed
        assert (output / "curves.png").read_bytes().startswith(b"\x89PNG") == (trained == "full")
        assert str(output / "adapter") in printed or not more


def test_only_the_first_rank_prints(finished):
    first, second = finished("full", "pipeline").outcomes
    assert first.printed and not second.printed


def _hf(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def _read(model: Any, pairs: list[oracle.Pair]) -> dict[int, Tensor]:
    return oracle.sequence_logps(model, pairs, [*LAYERS, NUM_LAYERS])


def _by_layer(logps: Mapping[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    """Log-probabilities `[2P]` of all pairs by layer."""
    layers = sorted({layer for layer, _ in logps})
    return {layer: torch.cat([logps[layer, pair] for pair in range(PAIRS)]) for layer in layers}


def _same_logps(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> None:
    assert ours.keys() == theirs.keys() == {*LAYERS, NUM_LAYERS}
    for layer, ours_2P in ours.items():
        difference = float((ours_2P - theirs[layer]).abs().max())
        assert difference <= LOGP_TOLERANCE, (layer, difference)


def test_heartbeats_announce_each_step_and_micro_batch(tiny, workers, tmp_path):
    """A process that announces nothing new for `training.timeout_s` within a step is stuck."""
    settings = {"max_steps": 2, "start_check": False, "export": False}
    file = write_config(tiny, tmp_path / "run", training=settings)
    (outcome,) = workers.run(run, 1, file, ReadActivities())
    announced = outcome.found["activities"]
    for step in (1, 2):
        assert announced.count((f"step {step}, training step", True)) >= 2, announced
    assert announced.count(("training", False)) == 2, announced
