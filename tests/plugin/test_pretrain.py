"""`examples/plugin/megatron_lm_pretrain.py`, with the wheel's `megatron.training`."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.errors import CheckpointError

from . import stock_model as stock
from .pretrain_run import (
    BETA,
    EXAMPLE,
    NO_EVAL,
    NUM_LAYERS,
    PAIRS,
    STEPS,
    TAPS,
    TIMEOUT_S,
    WEIGHT,
    Pretrain,
    check_flat,
    logged,
)
from .stock_run import Sequence

pytestmark = pytest.mark.distributed

RELATIVE = 1e-5
"""fp32 sums in another order."""

PRINTED = 2e-6
"""Megatron-LM prints 7 digits."""


@pytest.fixture(scope="module")
def pretrain_workers(workers):
    yield workers
    workers.replace_workers()  # `pretrain()` sets up logging and more


@pytest.fixture
def pretrain(tmp_path: Path, pretrain_workers) -> Pretrain:
    return Pretrain(tmp_path, pretrain_workers)


def oracle(pairs: list[tuple[list[int], ...]]) -> dict[str, Tensor]:
    """Gradients of the first step by plain autograd; the model is its own reference."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    (model,) = stock.build(Layout(), num_layers=NUM_LAYERS)
    layers = (*TAPS, NUM_LAYERS)
    total = torch.zeros(())
    for prompt, *answers in pairs:
        chosen, rejected = (
            stock.sequence_logps(
                model, Sequence([*prompt, *answer], _scored(prompt, answer)), layers
            )
            for answer in answers
        )
        for layer in layers:
            margin = chosen[layer] - rejected[layer]
            scale = 1 - WEIGHT if layer == NUM_LAYERS else WEIGHT / len(TAPS)
            total = total - scale * F.logsigmoid(BETA * (margin - margin.detach())) / len(pairs)
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _scored(prompt: list[int], answer: list[int]) -> list[int]:
    return list(range(len(prompt), len(prompt) + len(answer)))


def expected_gradients(pretrain: Pretrain) -> dict[str, Tensor]:
    loaded = load_pairs(
        [SourceConfig(path=str(pretrain.pairs))],
        load_tokenizer(str(pretrain.tokenizer)),
        cache=pretrain.directory / "tokens",
    )
    tokens = [
        tuple(
            part.tolist() for part in (pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens)
        )
        for pair in (loaded[index] for index in range(PAIRS))
    ]
    (expected,) = pretrain.workers.run(oracle, 1, tokens)
    return expected


def check_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        relative = (gradients[name] - gradient).norm() / gradient.norm()
        assert relative <= RELATIVE, f"{name}: {relative:.1e}"


STAGES = ("--pipeline-model-parallel-size", "2")


def test_two_stages_have_the_gradients_of_plain_autograd(pretrain):
    evaluation = ("--eval-pairs", str(pretrain.pairs), "--eval-interval", "1", "--eval-iters", "1")
    log = pretrain.log(2, *STAGES, "--train-iters", "2", *evaluation)
    check_gradients(pretrain.gradients, expected_gradients(pretrain))
    for name in ("loss", "final loss", "layer 1 loss", "layer 3 loss"):
        assert log[1][name] == pytest.approx(math.log(2), abs=PRINTED)
        assert log[2][name] < log[1][name]
        # The pairs that are trained on are evaluated too, with the weights of the next step.
        assert log[1]["all layers"][name] == pytest.approx(log[2][name], rel=PRINTED)
    assert log[1]["evaluated"]["final loss"] == log[1]["all layers"]["final loss"]
    assert "loss" not in log[1]["evaluated"], "it has the last stage's layer only"


LAYOUTS: dict[str, tuple[str, ...]] = {
    "tensor": ("--tensor-model-parallel-size", "2"),
    "pipeline": STAGES,
    "per-token": (*STAGES, "--calculate-per-token-loss"),
    "data": ("--use-distributed-optimizer", "--micro-batch-size", "2"),
}


@pytest.mark.exhaustive  # four runs each; the gradients of two stages are in the normal run
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_evaluates_saves_and_resumes_as_one_process(pretrain, name):
    evaluation = ("--eval-pairs", str(pretrain.pairs), "--eval-interval", "2", "--eval-iters", "1")
    schedule = ("--train-iters", "4", "--lr-decay-iters", "10", *evaluation)
    whole = pretrain.log(1, *schedule)
    gradients = expected_gradients(pretrain)
    check_gradients(pretrain.gradients, gradients)
    assert whole[4]["loss"] < whole[3]["loss"] < whole[1]["loss"]
    assert whole[2]["all layers"]["final loss"] == whole[2]["evaluated"]["final loss"]

    saved = str(pretrain.directory / "checkpoint")
    both = (*LAYOUTS[name], *schedule, "--save", saved, "--save-interval", "2")
    first = pretrain.log(2, *both, "--exit-interval", "2", cache="of-two")
    if LAYOUTS[name][:2] == STAGES:  # others' ranks have parts of every gradient
        check_gradients(pretrain.gradients, gradients)
    # Without Transformer Engine and apex, megatron-core does not load the distributed optimizer's
    # state (docs/decisions.md). With the weights only, the next step has the same losses.
    weights_only = ["--no-load-optim"] if name == "data" else []
    second = pretrain.log(2, *both, "--load", saved, *weights_only, cache="of-two")
    assert list(first) == [1, 2] and list(second) == [3, 4]
    if weights_only:
        del second[4], second[3]["learning rate"], whole[3]["learning rate"]
    for step, values in {**first, **second}.items():
        assert values.keys() == whole[step].keys()
        for key, value in values.items():
            assert value == pytest.approx(whole[step][key], rel=1e-4), f"step {step}, {key}"
    with pytest.raises(CheckpointError, match="the weights of iteration 4 are trained"):
        pretrain.log(2, *both, "--load", saved, *weights_only, cache="missing")


@pytest.mark.exhaustive  # starts three interpreters; the other tests call `pretrain_on_cpu.main`
def test_the_example_runs_under_torchrun(pretrain):
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    command = [sys.executable, "-m", *launcher, "-m", "megatron_idpo.testing.pretrain_on_cpu"]
    process = subprocess.run(
        [*command, str(EXAMPLE), *pretrain.arguments(*STAGES, "--train-iters", "2", *NO_EVAL)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_DATASETS_CACHE": str(pretrain.directory / "datasets"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    assert logged(process.stdout)[1]["loss"] == pytest.approx(math.log(2), abs=PRINTED)


@pytest.mark.exhaustive  # two hundred steps
def test_memory_is_flat(pretrain):
    log = pretrain.log(2, *STAGES, "--train-iters", str(STEPS), *NO_EVAL, memory_every=STEPS // 10)
    assert max(log) == STEPS
    for seen in pretrain.memory:
        check_flat(seen)
