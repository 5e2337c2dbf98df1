"""`examples/plugin/megatron_lm_pretrain.py` under torchrun, with the wheel's megatron.training."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer

from . import stock_model as stock
from .stock_run import Sequence

pytestmark = pytest.mark.distributed

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin" / "megatron_lm_pretrain.py"
PROBE = Path(__file__).with_name("pretrain_probe.py")
NUM_LAYERS, TAPS = 4, (1, 3)
PAIRS = 6
BETA, WEIGHT = 0.3, 0.4
RELATIVE = 1e-5
"""fp32 sums in another order."""

PRINTED = 2e-6
"""Megatron-LM prints 7 digits."""

TIMEOUT_S = 600  # a run takes about 15 s on an idle machine

MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --ffn-hidden-size 48 --seq-length 24 --max-position-embeddings 24
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 51 --make-vocab-size-divisible-by 26
"""
ON_CPU = """
    --distributed-backend gloo --transformer-impl local --use-cpu-initialization
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
"""
TRAINING = """
    --micro-batch-size 4 --global-batch-size 12 --lr 1e-2 --clip-grad 0 --log-interval 1
    --tap-layers 1 3 --beta 0.3 --intermediate-weight 0.4
"""


class Pretrain:
    """Runs of the example in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        rng = random.Random(0)

        def some(least: int, most: int) -> str:
            return " ".join(f"w{rng.randrange(50)}" for _ in range(rng.randint(least, most)))

        records = [
            {"prompt": some(3, 6), "chosen": " " + some(2, 6), "rejected": " " + some(2, 6)}
            for _ in range(PAIRS)
        ]
        self.pairs = directory / "pairs.jsonl"
        self.pairs.write_text("\n".join(map(json.dumps, records)))
        self.tokenizer = directory / "tokenizer"
        _word_tokenizer().save_pretrained(self.tokenizer)

    def start(self, world_size: int, *arguments: str, cache: str = "cache") -> Any:
        """Run the example on some ranks."""
        launcher = "torch.distributed.run", "--nproc-per-node", str(world_size), "--standalone"
        data = ("--pairs", self.pairs, "--tokenizer-model", self.tokenizer)
        data += ("--reference-cache", self.directory / cache)
        command = [sys.executable, "-m", *launcher, "-m", "megatron_idpo.testing.pretrain_on_cpu"]
        command += [PROBE, EXAMPLE, self.directory, *data]
        command += [*MODEL.split(), *ON_CPU.split(), *TRAINING.split(), *arguments]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_DATASETS_CACHE": str(self.directory / "datasets"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [str(part) for part in command],
            env=environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def log(self, world_size: int, *arguments: str, cache: str = "cache") -> dict[int, Any]:
        """The values in Megatron-LM's log line of every iteration."""
        process = self.start(world_size, *arguments, cache=cache)
        assert process.returncode == 0, process.stderr[-6000:]
        steps = {}
        for step, line in re.findall(r"iteration +(\d+)/ *\d+ \| (.*)", process.stdout):
            values = re.findall(r"\| ([^|]+?): (-?[\d.]+E[+-]\d+) ", line)
            steps[int(step)] = {name: float(value) for name, value in values}
        return steps

    def gradients(self) -> dict[str, Tensor]:
        """Of the first step, from all stages."""
        by_rank = [torch.load(path) for path in self.directory.glob("gradients-*.pt")]
        return {name: gradient for of_rank in by_rank for name, gradient in of_rank.items()}


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {**{f"w{index}": index for index in range(50)}, "</s>": 50}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


@pytest.fixture
def pretrain(tmp_path: Path) -> Pretrain:
    return Pretrain(tmp_path)


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


def test_two_stages_have_the_gradients_of_plain_autograd(pretrain, workers):
    log = pretrain.log(2, "--pipeline-model-parallel-size", "2", "--train-iters", "2", *NO_EVAL)
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
    (expected,) = workers.run(oracle, 1, tokens)
    gradients = pretrain.gradients()
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        relative = (gradients[name] - gradient).norm() / gradient.norm()
        assert relative <= RELATIVE, f"{name}: {relative:.1e}"
    for name in ("loss", "final loss", "layer 1 loss", "layer 3 loss"):
        assert log[1][name] == pytest.approx(math.log(2), abs=PRINTED)
        assert log[2][name] < log[1][name]


NO_EVAL = ("--eval-iters", "0", "--eval-interval", "1000")
LAYOUTS = {
    "tensor": ("--tensor-model-parallel-size", "2"),
    "pipeline": ("--pipeline-model-parallel-size", "2"),
    "data": ("--use-distributed-optimizer", "--micro-batch-size", "2"),
}


@pytest.mark.exhaustive  # ten runs; the gradients of two stages are in the normal run
def test_every_layout_evaluates_saves_and_resumes_as_one_process(pretrain):
    evaluation = ("--eval-pairs", str(pretrain.pairs), "--eval-interval", "2", "--eval-iters", "1")
    schedule = ("--train-iters", "4", "--lr-decay-iters", "10", *evaluation)
    whole = pretrain.log(1, *schedule)
    assert whole[4]["loss"] < whole[3]["loss"] < whole[1]["loss"]
    for name, arguments in LAYOUTS.items():
        saved = str(pretrain.directory / f"checkpoint-{name}")
        both = (*arguments, *schedule, "--save", saved, "--save-interval", "2")
        first = pretrain.log(2, *both, "--exit-interval", "2", cache=name)
        second = pretrain.log(2, *both, "--load", saved, cache=name)
        assert list(first) == [1, 2] and list(second) == [3, 4]
        for step, values in {**first, **second}.items():
            assert values == pytest.approx(whole[step], rel=1e-4), f"{name}, step {step}"
        refused = pretrain.start(2, *both, "--load", saved, cache="missing")
        assert refused.returncode and "the weights of iteration 2 are trained" in refused.stderr
