"""Whole runs equal the oracle: losses of three steps and the trained weights."""

from pathlib import Path
from shutil import copy

import pytest
import torch

from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.testing import write_tiny_hf_model
from tests import oracle

from .test_loop import LAYOUTS, TOLERANCE, FinishedRun, _hf, recompute_in
from .tiny_run import (
    BATCH_PAIRS,
    LAYERS,
    LORA,
    NUM_LAYERS,
    PAIRS,
    SIZES,
    Files,
    exported,
    relative_difference,
    run,
    write_config,
)

pytestmark = pytest.mark.distributed

ORACLE_TOLERANCE = 1e-4
"""Of weights in units of a tensor's root mean square; the oracle rounds gradients differently.
Measured: 4e-5."""

STEPWISE = {"optimizer": {"schedule": "constant", "warmup_steps": 0, "clip_grad": 0.0}}
ORACLES = {"beta": 0.3, "intermediate_weight": 0.4, "optimizer": "adam", "lr": 1e-2, "eps": 1e-4}
ORACLE_STEPS = 3


def oracle_batches(pairs: list[oracle.Pair]) -> list[list[oracle.Pair]]:
    """The pairs of the first steps."""
    order = stream_pairs(0, ORACLE_STEPS * BATCH_PAIRS, num_pairs=PAIRS, seed=3)
    return [[pairs[n] for n in order[first:][:BATCH_PAIRS]] for first in range(0, 18, BATCH_PAIRS)]


def test_full_training_equals_the_oracle(tiny, workers, tmp_path, pairs):
    training = {"max_steps": ORACLE_STEPS}
    file = write_config(tiny, tmp_path / "run", training=training, **STEPWISE)
    workers.run(run, 1, file)
    theirs = oracle.train_steps(
        _hf(tiny.model), "initial", oracle_batches(pairs), LAYERS, steps=ORACLE_STEPS, **ORACLES
    )
    _same_losses(FinishedRun(tmp_path / "run", []), theirs["losses"])
    assert relative_difference(exported(tmp_path / "run"), theirs["weights"]) <= ORACLE_TOLERANCE


WINDOW = 9
"""Tokens; sequences have about 30."""


@pytest.fixture(scope="module")
def windowed_model(tiny: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral with a sliding window in all layers, with the tokenizer of `tiny`."""
    directory = tmp_path_factory.mktemp("windowed") / "model"
    write_tiny_hf_model(directory, "mistral", 2, **SIZES, sliding_window=WINDOW)
    for file in tiny.model.glob("*token*"):
        copy(file, directory)
    return directory


@pytest.mark.parametrize(
    ("layout", "has_window"),
    [
        ("one", False),
        pytest.param("context-sequence", True, marks=pytest.mark.exhaustive),
        pytest.param("context", True, marks=pytest.mark.exhaustive),
        pytest.param("context-4", False, marks=pytest.mark.exhaustive),
    ],
)
def test_lora_training_equals_the_oracle_with_peft(
    tiny, windowed_model, workers, tmp_path, pairs, layout, has_window
):
    """Both start from a new adapter of PEFT."""
    directory = windowed_model if has_window else tiny.model
    world_size, section = LAYOUTS[layout]
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(6)
        model = get_peft_model(_hf(directory), settings)
    model.save_pretrained(tmp_path / "fresh")
    lora = {**LORA, "adapter": str(tmp_path / "fresh")}
    file = write_config(
        tiny,
        tmp_path / "run",
        model={"path": str(directory)},
        layout=section,
        lora=lora,
        training={"max_steps": ORACLE_STEPS, **recompute_in(layout)},
        **STEPWISE,
    )
    workers.run(run, world_size, file)
    theirs = oracle.train_steps(
        model.get_base_model(),
        "initial",
        oracle_batches(pairs),
        LAYERS,
        steps=ORACLE_STEPS,
        trainable="lora_",
        **ORACLES,
    )
    _same_losses(FinishedRun(tmp_path / "run", []), theirs["losses"])
    adapters = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{name.replace('.default', '')}": weight
        for name, weight in theirs["weights"].items()
        if "lora_" in name
    }
    assert relative_difference(adapters, expected) <= ORACLE_TOLERANCE


def _same_losses(done: FinishedRun, theirs: list[oracle.Losses]) -> None:
    assert [float(losses.total) for losses in theirs] == pytest.approx(
        done.steps("loss"), abs=TOLERANCE
    )
    for layer in (*LAYERS, NUM_LAYERS):
        name = "final_loss" if layer == NUM_LAYERS else f"layer_{layer}/loss"
        expected = [float(losses.by_layer[layer]) for losses in theirs]
        assert done.steps(name) == pytest.approx(expected, abs=TOLERANCE), name
    assert max(done.steps("loss")) - min(done.steps("loss")) > 0.003, "the loss must change"
