"""Errors before and during a run: one message, and checkpoints stay usable."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.data.pairs import stream_pairs
from megatron_idpo.data.run_pairs import load_run_pairs
from megatron_idpo.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from megatron_idpo.storage.lock import locked
from megatron_idpo.testing import write_tiny_hf_model

from .fake_hub import running_hub
from .run_hooks import Break, CountSteps, NoWeights, Spoil, SpoilAfter, stop_after
from .tiny_run import (
    BATCH_PAIRS,
    LORA,
    ODD_PAIR,
    PAIRS,
    SIZES,
    STEPS,
    Files,
    Outcome,
    exported,
    is_finite,
    run,
    write_config,
)

pytestmark = pytest.mark.distributed

NAN = float("nan")
EMBEDDING = "embedding.word_embeddings.weight"


# ---- NaN and infinity ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_token(tiny: Files, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A token that only `ODD_PAIR` has."""
    file = write_config(tiny, tmp_path_factory.mktemp("pairs") / "run")
    pairs = load_run_pairs(load_config(file, required=REQUIRED, optional=OPTIONAL)).train
    tokens = [
        {*np.concatenate((pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens)).tolist()}
        for pair in pairs
    ]
    others = set().union(*(each for pair, each in enumerate(tokens) if pair != ODD_PAIR))
    return min(tokens[ODD_PAIR] - others)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_nan_loss_is_reported_with_its_pair(tiny, workers, tmp_path, odd_token, processes):
    """The next start resumes from the last checkpoint."""
    order = stream_pairs(0, STEPS * BATCH_PAIRS, num_pairs=PAIRS, seed=3).tolist()
    bad = order.index(ODD_PAIR, 2 * BATCH_PAIRS) // BATCH_PAIRS + 1
    file = write_config(
        tiny, tmp_path / "run", layout={"pipeline": processes}, checkpoint={"every_steps": 1}
    )
    spoil = Spoil(EMBEDDING, NAN, row=odd_token, before_step=bad)
    message = error_of(TrainingError, workers, processes, file, spoil)
    assert message.startswith(f"step {bad}: NaN or infinite at layer 1 (loss")
    assert "; layer 3 (loss" in message and "; layer 4 (loss" in message
    assert f"in the pairs {tiny.train}:{ODD_PAIR + 1};" in message
    assert "lower optimizer.lr" in message
    saved = tmp_path / "run" / "checkpoints" / f"step-{bad - 1:08d}"
    assert message.endswith(f"last checkpoint: {saved}") and saved.is_dir()

    outcomes = workers.run(run, processes, file, CountSteps())
    assert outcomes[0].found["steps"] == list(range(bad, STEPS + 1))
    assert is_finite(exported(tmp_path / "run"))


def test_only_layers_with_nan_are_named(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run")
    spoil = Spoil("decoder.layers.1.mlp.linear_fc2.weight", NAN, before_step=3)
    message = error_of(TrainingError, workers, 1, file, spoil)
    assert message.startswith("step 3: NaN or infinite at layer 3 (loss")
    assert "layer 4 (" in message and "layer 1 (" not in message
    assert message.count("train.jsonl:") == 5 and "and 1 more" in message
    assert message.endswith("no checkpoint has been saved yet")


def test_huge_learning_rate_fails_in_the_second_step(tiny, workers, tmp_path):
    optimizer = {"lr": 1e30, "warmup_steps": 0, "schedule": "constant"}
    file = write_config(tiny, tmp_path / "run", optimizer=optimizer)
    message = error_of(TrainingError, workers, 1, file)
    assert message.startswith("step 2: NaN or infinite at layer")


@pytest.mark.parametrize(
    ("held_out", "message"),
    [(True, "evaluation after step 1: the held-out pairs are NaN"), (False, "step 1: the update")],
)
def test_nan_after_the_last_step_is_neither_saved_nor_exported(
    tiny, workers, tmp_path, held_out, message
):
    """There is no later step that would detect it."""
    sections: dict[str, Any] = {
        "optimizer": {"lr": 1e30 if held_out else 1e-2, "warmup_steps": 0},
        "training": {"max_steps": 1},
        "data": {"eval": str(tiny.held_out)} if held_out else {},
    }
    hooks = () if held_out else (SpoilAfter("final_layernorm.weight", NAN, step=1),)
    error = error_of(
        TrainingError, workers, 1, write_config(tiny, tmp_path / "run", **sections), *hooks
    )
    assert error.startswith(message) and error.endswith("no checkpoint has been saved yet")
    assert not (tmp_path / "run" / "hf").exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_background_save_completes_after_an_error(tiny, workers, tmp_path):
    file = write_config(
        tiny, tmp_path / "run", checkpoint={"every_steps": 2}, training={"max_steps": 4}
    )
    message = error_of(ConfigError, workers, 1, file, Break(step=3, save_s=0.5))
    assert message == "training.output: is full"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    (outcome,) = workers.run(run, 1, file, CountSteps())
    assert outcome.found["steps"] == [3, 4]


# ---- the start check ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "spoil"),
    [
        ({"layout": {"pipeline": 2}}, Spoil("decoder.layers.2.mlp.linear_fc2.weight", 0.0)),
        ({"lora": LORA, "layout": {"pipeline": 2}}, Spoil("layers.2.down_proj.B", 0.1)),
    ],
    ids=["full", "lora"],
)
def test_start_check_reports_differing_layers(tiny, workers, tmp_path, sections, spoil):
    file = write_config(tiny, tmp_path / "run", **sections)
    message = error_of(TrainingError, workers, 2, file, spoil)
    assert message.startswith("start check: policy and reference should be equal")
    assert "0.693147" in message and "layer 3 (loss" in message and "layer 4 (loss" in message
    assert "layer 1 (" not in message and "training.start_check" in message
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_start_check_can_be_disabled(tiny, workers, tmp_path):
    training = {"start_check": False, "max_steps": 2, "export": False}
    file = write_config(tiny, tmp_path / "run", training=training)
    spoil = Spoil("decoder.layers.2.mlp.linear_fc2.weight", 0.0)
    (outcome,) = workers.run(run, 1, file, spoil)
    assert outcome.code == 0 and "start check" not in outcome.printed
    assert not (tmp_path / "run" / "hf").exists()


# ---- before weights are read --------------------------------------------------------------------

INVALID: dict[str, tuple[dict[str, Any], type[UserError], tuple[str, ...]]] = {
    "model": (
        {"model": {"path": "/no/such/model"}},
        CheckpointError,
        ("model.path", "/no/such/model is not a directory", "hub model"),
    ),
    "layers": (
        {"objective": {"layers": [1, 9]}},
        ConfigError,
        ("objective.layers", "9", "4 layers"),
    ),
    "layout": ({"layout": {"tensor": 3}}, ConfigError, ("layout.tensor",)),
    "world": ({"layout": {"pipeline": 2}}, ConfigError, ("layout", "do not divide the world of 1")),
    "fp16": ({"model": {"dtype": "fp16"}}, ConfigError, ("model.dtype", "fp16", "use bf16")),
    "all": (
        {"model": {"dtype": "fp16"}, "objective": {"layers": [9]}, "layout": {"tensor": 3}},
        ConfigError,
        ("model.dtype", "objective.layers", "layout.tensor"),
    ),
    "weights of layers": (
        {"objective": {"layer_weights": [1.0]}},
        ConfigError,
        ("objective.layer_weights", "1 weights for 2 layers"),
    ),
    "data": ({"data": {"train": "/no/such/pairs.jsonl"}}, DataError, ("/no/such/pairs.jsonl",)),
    "row": (
        {"data": {"row_tokens": 8, "max_length": 8, "trim_tokens": 8}},
        DataError,
        ("train.jsonl", "row_tokens"),
    ),
    "batch": (
        {"training": {"global_batch_pairs": 100}},
        DataError,
        ("training.global_batch_pairs", "100 pairs", "at most 48"),
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_configuration_is_reported_before_weights_are_read(tiny, workers, tmp_path, name):
    sections, kind, parts = INVALID[name]
    file = write_config(tiny, tmp_path / "run", **sections)
    message = error_of(kind, workers, 1, file, NoWeights())
    assert all(part in message for part in parts), message


def test_tokenizer_of_another_model_is_reported(tiny, workers, tmp_path):
    small = write_tiny_hf_model(tmp_path / "small", "llama", **{**SIZES, "vocab_size": 260})
    model = {"path": str(small), "tokenizer": str(tiny.model)}
    file = write_config(tiny, tmp_path / "run", model=model)
    message = error_of(ConfigError, workers, 1, file, NoWeights())
    assert message.startswith("model.tokenizer: token ") and "vocabulary ends at 259" in message


def test_output_that_cannot_be_written_is_reported(tiny, workers, tmp_path):
    (tmp_path / "file").write_text("")
    training = {"output": str(tmp_path / "file" / "run")}
    file = write_config(tiny, tmp_path / "run", training=training)
    message = error_of(ConfigError, workers, 2, file, NoWeights())
    assert f"training.output: {tmp_path / 'file' / 'run'} cannot be written" in message


def test_output_of_a_running_run_is_reported(tiny, workers, tmp_path):
    (tmp_path / "run").mkdir()
    file = write_config(tiny, tmp_path / "run")
    with locked(tmp_path / "run" / ".lock"):
        message = error_of(ConfigError, workers, 2, file, NoWeights())
    assert "training.output" in message and "is being written by another run" in message


# ---- resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of two steps with adapters."""
    output = tmp_path_factory.mktemp("two") / "run"
    workers.run(run, 1, write_config(tiny, output, lora=LORA, training={"max_steps": 2}))
    return output


CHANGED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "objective": ({"objective": {"beta": 0.2}}, ("objective.beta", "0.3", "0.2")),
    "layers": ({"objective": {"layers": [1]}}, ("objective.layers", "[1, 3]", "[1]")),
    "rank": ({"lora": {**LORA, "rank": 8}}, ("lora.rank", "4", "8")),
    "lora": ({"lora": None}, ("lora",)),
    "order": ({"data": {"seed": 4}}, ("seed", "3", "4")),
    "pairs": ({"data": {"max_length": 8}}, ("the data (section `data`) differs",)),
    "never": ({"checkpoint": {"resume": "never"}}, ("training.output", "already has a checkpoint")),
}


@pytest.mark.parametrize("name", CHANGED)
def test_resuming_with_changed_objective_or_data_is_rejected(tiny, workers, two_steps, name):
    changes, parts = CHANGED[name]
    before = (two_steps / "config.yaml").read_bytes()
    file = write_config(tiny, two_steps, **{"lora": LORA, **changes})
    message = error_of(UserError, workers, 1, file, NoWeights())
    assert all(part in message for part in parts), message
    assert "output" in message or "resume with" in message, message
    assert (two_steps / "config.yaml").read_bytes() == before
    assert (two_steps / "checkpoints" / "step-00000002").is_dir()


def test_resuming_with_another_model_is_rejected(tiny, workers, two_steps, tmp_path):
    other = write_tiny_hf_model(tmp_path / "other", "llama", seed=9, **SIZES)
    model = {"path": str(other), "tokenizer": str(tiny.model)}
    file = write_config(tiny, two_steps, lora=LORA, model=model)
    message = error_of(CheckpointError, workers, 1, file, NoWeights())
    assert "the base model" in message and "step-00000002" in message


def test_learning_rate_length_and_layout_may_change(tiny, workers, two_steps):
    """Learning rate, length, layout."""
    file = write_config(
        tiny,
        two_steps,
        lora=LORA,
        optimizer={"lr": 1e-3},
        training={"max_steps": 3},
        layout={"pipeline": 2},
    )
    outcomes = workers.run(run, 2, file, CountSteps())
    assert all(outcome.found["steps"] == [3] for outcome in outcomes)


@pytest.fixture(scope="module")
def four_steps(tiny: Files, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that was stopped after 4 of 8 steps; not to be changed."""
    output = tmp_path_factory.mktemp("four") / "run"
    workers.run(run, 1, write_config(tiny, output), stop_after(4))
    return output


@pytest.mark.parametrize(("batch_pairs", "steps"), [(3, 8), (12, 2)])
def test_resumed_run_with_another_batch_size_ends_with_the_data(
    tiny, workers, tmp_path, four_steps, batch_pairs, steps
):
    """24 of 48 pairs have been used after 4 steps of 6."""
    output = shutil.copytree(four_steps, tmp_path / "run")
    training = {"global_batch_pairs": batch_pairs, "export": False}
    (outcome,) = workers.run(run, 1, write_config(tiny, output, training=training), CountSteps())
    assert outcome.code == 0
    assert outcome.found["steps"] == list(range(5, 5 + steps))


def error_of(kind: type[UserError], workers: Any, processes: int, file: str, *hooks: Any) -> str:
    """The message of the run's error."""
    with pytest.raises(kind) as raised:
        workers.run(run, processes, file, *hooks)
    return str(raised.value)


# ---- the hub ------------------------------------------------------------------------------------


def run_with_hub(file: str, endpoint: str) -> Outcome:
    """A run that publishes to a stand-in of the hub."""
    import os
    from unittest.mock import patch

    with (
        patch("huggingface_hub.constants.ENDPOINT", endpoint),
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", False),
        patch.dict(os.environ, HF_TOKEN="hf_stand_in"),
    ):
        return run(file, CountSteps())


def test_wrong_token_is_found_before_training_and_not_needed_to_resume(tiny, workers, tmp_path):
    sections = {"training": {"max_steps": 2}, "export": {"push_to_hub": "me/aligned"}}
    file = write_config(tiny, tmp_path / "run", **sections)
    with running_hub() as hub:
        hub.refuses = True
        with pytest.raises(CheckpointError, match=r"me/aligned: cannot be written: .*401"):
            workers.run(run_with_hub, 2, file, hub.endpoint)
        assert not (tmp_path / "run" / "config.yaml").exists()
        hub.refuses = False
        outcomes = workers.run(run_with_hub, 2, file, hub.endpoint)
        assert [outcome.code for outcome in outcomes] == [0, 0]
        assert {"README.md", "model.safetensors"} <= set(hub.files["me/aligned"])
        hub.refuses = True
        with pytest.raises(CheckpointError, match="me/aligned: cannot be uploaded"):
            workers.run(run_with_hub, 2, file, hub.endpoint)
