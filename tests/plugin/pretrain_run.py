"""Runs `examples/plugin/megatron_lm_pretrain.py` on the ranks of a worker pool.

As under torchrun with `testing.pretrain_on_cpu`, but in processes that have imported torch already,
and with known weights. `Pretrain` is the end in the test.
"""

import gc
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from . import stock_model as stock
from . import tiny_megatron as tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin" / "megatron_lm_pretrain.py"
NUM_LAYERS, TAPS = 4, (1, 3)
PAIRS = 6
BETA, WEIGHT = 0.3, 0.4
TIMEOUT_S = 300.0
STEPS = 200
"""Of the tests of memory."""

MAX_GROWTH_BYTES = 8 << 20
"""Of the resident size after the first steps. 0.7 to 3.5 MB were measured with constant numbers of
tensors and of all Python objects: fragments of the heap."""

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
NO_EVAL = ("--eval-iters", "0", "--eval-interval", "1000")


class Pretrain:
    """Runs of the example in one directory."""

    def __init__(self, directory: Path, workers: Any) -> None:
        self.directory = directory
        self.workers = workers
        self.gradients: dict[str, Tensor] = {}
        """Of the first step of the last run, from all stages."""
        self.memory: list[list[tuple[int, int]]] = []
        """Of the last run, by rank (`watching_memory`)."""
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

    def arguments(self, *more: str, cache: str = "cache") -> list[str]:
        """Of the example."""
        data = ("--pairs", self.pairs, "--tokenizer-model", self.tokenizer)
        data += ("--reference-cache", self.directory / cache)
        settings = (*MODEL.split(), *ON_CPU.split(), *TRAINING.split())
        return [str(part) for part in (*data, *settings, *more)]

    def log(
        self, world_size: int, *more: str, cache: str = "cache", memory_every: int = 0
    ) -> dict[int, Any]:
        """Run the example; the values in Megatron-LM's log line of every iteration."""
        by_rank = self.workers.run(
            run_example,
            world_size,
            self.arguments(*more, cache=cache),
            self.directory / "datasets",
            memory_every=memory_every,
            timeout_s=TIMEOUT_S,
        )
        self.gradients = tiny.merged([answer["gradients"] for answer in by_rank])
        self.memory = [answer["memory"] for answer in by_rank]
        return logged("".join(answer["printed"] for answer in by_rank))


def logged(printed: str) -> dict[int, Any]:
    """The values of every iteration, and of its evaluations: `evaluated`, and of all layers."""
    steps: dict[int, Any] = {}
    step = 0
    for line in printed.splitlines():
        if match := re.search(r"iteration +(\d+)/ *\d+ \|", line):
            step = int(match[1])
            values = _values(r"\| ([^|]+?): (-?[\d.]+E[+-]\d+) ", line)
            if len(steps) == 1:
                # After a process's first step Megatron-LM logs without resetting its sums, so its
                # second line has the means of both.
                (first,) = steps.values()
                means = values.keys() & first.keys() - {"learning rate"}
                values |= {name: 2 * values[name] - first[name] for name in means}
            steps[step] = values
        elif "validation loss at iteration" in line:
            steps[step]["evaluated"] = _values(r"\| ([^|]+?) value: (-?[\d.]+E[+-]\d+) ", line)
        elif "evaluation of all layers" in line:
            steps[step]["all layers"] = _values(r"\| ([^|]+?) value: (-?[\d.]+E[+-]\d+) ", line)
    return steps


def _values(pattern: str, line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(pattern, line)}


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {**{f"w{index}": index for index in range(50)}, "</s>": 50}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


# ---- on the ranks --------------------------------------------------------------------------------


def run_example(arguments: list[str], datasets: Path, *, memory_every: int) -> dict[str, Any]:
    """Run the example on this rank: what it prints, gradients of the first step, memory."""
    from megatron_idpo.megatron_lm.pretrain import PretrainDpo
    from megatron_idpo.testing import pretrain_on_cpu

    gradients: dict[str, Tensor] = {}
    attach_hook = PretrainDpo.pre_wrap_hook

    def hook(self: PretrainDpo, chunks: list[Any]) -> list[Any]:
        from megatron_idpo.mcore.model.build import global_parameters

        for name, parameter in global_parameters(chunks):
            whole = stock.whole_weight(name, parameter)
            parameter.data.copy_(stock.cut(name, whole, stock.Cut.of(parameter)))
        attach_hook(self, chunks)
        config = chunks[0].config
        finish = config.finalize_model_grads_func

        def finish_and_keep(*args: Any, **kwargs: Any) -> None:
            finish(*args, **kwargs)
            if not gradients:
                gradients.update(tiny.gradients(chunks))

        config.finalize_model_grads_func = finish_and_keep
        return chunks

    argv = ["pretrain_on_cpu", str(EXAMPLE), *arguments]
    with (
        restored_after_pretrain(),
        patch("datasets.config.HF_DATASETS_CACHE", datasets),
        patch.object(PretrainDpo, "pre_wrap_hook", hook),
        patch.object(sys, "argv", argv),
        watching_memory(memory_every) as memory,
        redirect_stdout(io.StringIO()) as printed,
    ):
        try:
            pretrain_on_cpu.main()
        except SystemExit as end:  # --exit-interval
            assert not end.code
    return {"printed": printed.getvalue(), "gradients": gradients, "memory": memory}


@contextmanager
def restored_after_pretrain() -> Iterator[None]:
    """Undo what `pretrain()` and its redirection to a CPU leave in the process."""
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import training
    from megatron.training.global_vars import unset_global_variables

    # With a known start of the program, ranks exchange it; a process of the pool may be new.
    with patch.dict(vars(torch.cuda)), patch.dict(training._STARTUP_TIMESTAMPS):
        try:
            yield
        finally:
            unset_global_variables()
            destroy_rerun_state_machine()


@contextmanager
def watching_memory(every: int) -> Iterator[list[tuple[int, int]]]:
    """Live tensors and resident bytes of this process after every few steps; 0: none."""
    from megatron_idpo.plugin.attach import AttachedDpo

    seen: list[tuple[int, int]] = []
    finish: Callable[..., None] = AttachedDpo.finalize_model_grads
    steps = 0

    def finish_and_watch(self: AttachedDpo, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        finish(self, *args, **kwargs)
        steps += 1
        if every and steps % every == 0:
            gc.collect()
            tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
            seen.append((tensors, _resident_bytes()))

    with patch.object(AttachedDpo, "finalize_model_grads", finish_and_watch):
        yield seen


def _resident_bytes() -> int:
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


def check_flat(seen: list[tuple[int, int]]) -> None:
    """Compare what `watching_memory` saw after the first steps and at the end."""
    (first_tensors, first_bytes), (last_tensors, last_bytes) = seen[1], seen[-1]
    assert last_tensors <= first_tensors, seen
    assert last_bytes - first_bytes <= MAX_GROWTH_BYTES, seen
