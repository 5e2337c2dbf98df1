"""Every layout equals Transformers: logits, gradients, weights after one optimizer step.

Each case starts one layout, builds the model from a Hugging Face checkpoint, runs megatron-core's
schedules and optimizer, and collects the results under Hugging Face names. They are compared with
Transformers' logits, autograd's gradients and torch's Adam on the same tokens, so TP1-PP1 is
tested like every other layout instead of being the reference.

Every rank generates the same tokens from a seed.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

# fp32 sums in another order: 8 layers of a tiny model differ by ~1e-6 on logits of order 1.
LOGITS_ABSOLUTE = 1e-4
# The same, on gradients, as |difference| / |gradient| per tensor (Frobenius).
GRADIENT_RELATIVE = 1e-5
# After one Adam step (eps 1e-4, so that tiny gradients are not blown up), in units of the lr.
STEP_IN_LR = 1e-3

NUM_SEQUENCES, SEQUENCE_TOKENS = 4, 16
ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-4}
BIG = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied-odd-vocab": ("llama", {"tie_word_embeddings": True, "vocab_size": 509}),
    "llama3-rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-half-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", {}),
}


@dataclass(frozen=True)
class Case:
    """One layout in one world, and how many data-parallel replicas share the sequences."""

    layout: Layout
    world_size: int
    distributed_optimizer: bool = False

    def __str__(self) -> str:
        layout = self.layout
        parts = [f"TP{layout.tensor}", f"PP{layout.pipeline}"]
        parts += [f"VP{layout.virtual_pipeline}"] if layout.virtual_pipeline > 1 else []
        parts += ["SP"] if layout.sequence_parallel else []
        parts += ["uneven"] if layout.pipeline_layers else []
        data = layout.data(self.world_size)
        parts += [f"DP{data}"] if data > 1 else []
        return "-".join(parts + (["distopt"] if self.distributed_optimizer else []))


def _cases() -> list[Case]:
    cases = []
    for tensor in (1, 2, 4):
        for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2)):
            for sequence in (False, True) if tensor > 1 else (False,):
                if tensor * pipeline <= 8:
                    layout = Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        sequence_parallel=sequence,
                    )
                    cases.append(Case(layout, tensor * pipeline))
    for replicated in (
        Layout(),
        Layout(tensor=2, sequence_parallel=True),
        Layout(pipeline=2, virtual_pipeline=2),
    ):
        for distributed_optimizer in (False, True):
            cases.append(Case(replicated, 2 * replicated.model_ranks, distributed_optimizer))
    cases.append(Case(Layout(pipeline=4, pipeline_layers=(1, 3, 3, 1)), 4))
    return cases


CASES = _cases()


IN_MAKE_TEST = {
    "TP1-PP1": "llama-yarn",
    "TP2-PP1": "llama-tied-odd-vocab",
    "TP2-PP2-SP": "qwen2-half-windows",
    "TP1-PP2-VP2": "llama3-rope",
    "TP4-PP1-SP": "qwen3",
    "TP1-PP4-uneven": "mistral-window",
    "TP2-PP1-SP-DP2-distopt": "llama",
    "TP1-PP2-VP2-DP2": "qwen2",
}
"""Each model once; together they have each dimension, each pair of two, and at most 4 ranks."""


def _pairs() -> list[Any]:
    return [
        pytest.param(
            case,
            model,
            id=f"{case}-{model}",
            marks=[] if IN_MAKE_TEST.get(str(case)) == model else [pytest.mark.exhaustive],
        )
        for case in CASES
        for model in MODELS
    ]


def _tokens(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, vocab_size, (NUM_SEQUENCES, SEQUENCE_TOKENS + 1), generator=generator)


# ---- Transformers' results -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """Tiny checkpoints on disk, created on first use."""
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model)
            family, overrides = MODELS[model]
            write_tiny_hf_model(made[model], family, seed=3, **(BIG | overrides))
        return made[model]

    return make


@pytest.fixture(scope="session")
def expected(model_directory):
    """Logits, gradients and weights after a step, by Transformers and torch."""
    known: dict[str, dict[str, Any]] = {}

    def compute(model: str) -> dict[str, Any]:
        if model not in known:
            known[model] = _transformers_results(model_directory(model))
        return known[model]

    return compute


def _transformers_results(directory: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", pad_token_id=None
    )
    tokens = _tokens(model.config.vocab_size)
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    optimizer.step()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return {"logits": logits.detach(), "gradients": gradients, "weights": weights}


# ---- Megatron's results, on every rank -----------------------------------------------------------


def megatron_results(directory: str, case: Case) -> dict[str, dict[str, Tensor]]:
    """This rank's part of logits, gradients and updated weights."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    checkpoint, architecture = open_hf(Path(directory))
    layout = case.layout
    start_layout(layout)
    chunks = build_model(architecture, layout)
    load_hf_weights(chunks, checkpoint, architecture)
    wrapped, optimizer = _with_optimizer(chunks, case)
    batches = _batches(architecture.vocab_size)
    logits = _run(wrapped, batches, architecture.vocab_size)
    gradients = dict(whole_tensors(chunks, architecture, lambda weight: weight.main_grad))
    optimizer.step()
    weights = dict(whole_tensors(chunks, architecture))
    return {
        "logits": {f"{key}": value for key, value in logits.items()},
        "gradients": {name: value.clone() for name, value in gradients.items()},
        "weights": {name: value.clone() for name, value in weights.items()},
    }


def _with_optimizer(chunks: list[Any], case: Case) -> tuple[list[Any], Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = DistributedDataParallelConfig(use_distributed_optimizer=case.distributed_optimizer)
    config = chunks[0].config
    wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=ADAM["lr"],
            adam_beta1=ADAM["betas"][0],
            adam_beta2=ADAM["betas"][1],
            adam_eps=ADAM["eps"],
            weight_decay=0.0,
            clip_grad=0.0,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        wrapped,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped, optimizer


def _batches(vocab_size: int) -> list[tuple[int, Tensor]]:
    """This replica's sequences with their indices."""
    from megatron.core import parallel_state

    tokens = _tokens(vocab_size)
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    return [(number, tokens[number : number + 1]) for number in range(rank, NUM_SEQUENCES, size)]


def _run(wrapped: list[Any], batches: list[Any], vocab_size: int) -> dict[int, Tensor]:
    """Forward and backward by megatron-core's schedule; this rank's shards of the logits."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_idpo.mcore.attention.row_params import RowParams

    collected: dict[int, Tensor] = {}

    def loss(number: int, labels: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        collected[number] = logits.detach().clone()
        # megatron-core's own loss would include the padded rows of the vocabulary in the softmax.
        whole = gather_from_tensor_model_parallel_region(logits)[..., :vocab_size]
        return torch.nn.functional.cross_entropy(whole.flatten(0, 1), labels.flatten()), {}

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        number, tokens = next(iterator)
        output = model(
            tokens[:, :-1],
            torch.arange(SEQUENCE_TOKENS)[None],
            None,
            packed_seq_params=RowParams.plain(SEQUENCE_TOKENS),
        )
        return output, partial(loss, number, tokens[:, 1:])

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=SEQUENCE_TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )
    rank = parallel_state.get_tensor_model_parallel_rank()
    return {number * 100 + rank: value for number, value in collected.items()}


# ---- the comparison ------------------------------------------------------------------------------


def _merged(answers: list[dict[str, dict[str, Tensor]]], kind: str) -> dict[str, Tensor]:
    return {name: value for answer in answers for name, value in answer[kind].items()}


def _assert_same_logits_and_gradients(case: Case, answers: list[Any], truth: Any) -> None:
    shards = _merged(answers, "logits")
    whole = [
        torch.cat([shards[str(n * 100 + rank)] for rank in range(case.layout.tensor)], dim=-1)
        for n in range(NUM_SEQUENCES)
    ]
    logits = torch.cat(whole)[..., : truth["logits"].shape[-1]]
    assert (logits - truth["logits"]).abs().max() <= LOGITS_ABSOLUTE

    gradients = _merged(answers, "gradients")
    assert set(gradients) == set(truth["gradients"])
    # The distributed optimizer reduces each rank's part of a gradient to that rank alone.
    for name, gradient in truth["gradients"].items() if not case.distributed_optimizer else ():
        relative = (gradients[name] - gradient).norm() / gradient.norm()
        assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "model"), _pairs())
def test_layout_equals_transformers(case, model, workers, model_directory, expected):
    directory = model_directory(model)
    answers = workers.run(megatron_results, case.world_size, str(directory), case)
    truth = expected(model)
    _assert_same_logits_and_gradients(case, answers, truth)
    weights = _merged(answers, "weights")
    assert set(weights) == set(truth["weights"])
    for name, weight in truth["weights"].items():
        moved = (weights[name] - weight).abs().max()
        assert moved <= STEP_IN_LR * ADAM["lr"], f"{name}: {moved / ADAM['lr']:.2e} lr"


STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"

# Its five layers do not divide evenly over the stages.
REAL_LAYOUTS = {
    "TP2-PP2-SP": Layout(tensor=2, sequence_parallel=True, pipeline=2, pipeline_layers=(3, 2)),
    "TP2-SP": Layout(tensor=2, sequence_parallel=True),
    "TP4-SP": Layout(tensor=4, sequence_parallel=True),
    "PP2": Layout(pipeline=2, pipeline_layers=(3, 2)),
    "PP2-VP2": Layout(pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 2, 1, 1)),
    "PP4": Layout(pipeline=4, pipeline_layers=(1, 1, 2, 1)),
}


@pytest.mark.distributed
@pytest.mark.skipif(not STORIES.is_dir(), reason="no real checkpoint next to this checkout")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[pytest.mark.exhaustive] if number > 0 else [])
        for number, (name, layout) in enumerate(REAL_LAYOUTS.items())
    ],
)
def test_real_weights_equal_transformers(layout, workers):
    """Without an optimizer step: Adam amplifies rounding where a gradient is as small as eps."""
    case = Case(layout, layout.model_ranks)
    answers = workers.run(megatron_results, case.world_size, str(STORIES), case)
    _assert_same_logits_and_gradients(case, answers, _transformers_results(STORIES))
