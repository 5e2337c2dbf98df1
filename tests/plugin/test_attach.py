"""Intermediate DPO on stock schedules equals the oracle, in every layout.

Each case trains three steps by megatron-core's own schedule, gradient reduction and optimizer and
is compared with `tests/oracle.py`: every layer's loss in every step, all gradients of the first
step, all weights after the third. The reference is another model, so that no margin is zero.
"""

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idpo.mcore.layout import Layout
from megatron_idpo.testing import write_tiny_hf_model

# fp32 sums in another order, through 8 layers and a log-softmax.
LOSS_ABSOLUTE = 2e-5
# |difference| / |gradient| per tensor (Frobenius).
GRADIENT_RELATIVE = 1e-5
# Three Adam steps with eps 1e-4, in units of the learning rate.
STEPS_IN_LR = 5e-3

SIZES = {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VOCAB, NUM_LAYERS, ROW_TOKENS, PAIRS, LR, EPS = 99, 8, 48, 6, 1e-2, 1e-4
STEPS = 3
PLAIN = Layout()


def _load_oracle() -> Any:
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parents[1] / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()


@dataclass(frozen=True)
class Case:
    """One way to run the same three steps."""

    layout: Layout = PLAIN
    data: int = 1
    taps: tuple[int, ...] = (3, 6)
    tied: bool = False
    frozen_head: bool = False
    recompute: str = "off"
    distributed_optimizer: bool = False
    overlap: bool = False
    loss_scale: float = 1.0
    more_rows: int = 0
    """Empty rows to add on every rank."""

    @property
    def world_size(self) -> int:
        return self.layout.model_ranks * self.data

    def __str__(self) -> str:
        layout = self.layout
        words = [f"TP{layout.tensor}", f"PP{layout.pipeline}", f"VP{layout.virtual_pipeline}"]
        words += [f"DP{self.data}", "taps" + "_".join(map(str, self.taps)), self.recompute]
        words += ["SP"] if layout.sequence_parallel else []
        flags = ("tied", "frozen_head", "distributed_optimizer", "overlap")
        words += [flag for flag in flags if getattr(self, flag)]
        words += [f"scale{self.loss_scale:g}"] if self.loss_scale != 1 else []
        words += [f"empty{self.more_rows}"] if self.more_rows else []
        return "-".join(words)


def _layout(tensor: int = 1, pipeline: int = 1, virtual: int = 1, sp: bool = False) -> Layout:
    return Layout(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, sequence_parallel=sp)


CASES = [
    Case(taps=()),
    Case(),
    Case(tied=True, recompute="block"),
    Case(frozen_head=True, recompute="uniform", taps=(1, 4, 7)),
    Case(_layout(tensor=2), taps=(2,)),
    Case(_layout(tensor=2, sp=True), tied=True),
    Case(_layout(pipeline=2), taps=(1, 4, 6)),
    Case(_layout(pipeline=2), tied=True, taps=(2, 3, 7), recompute="uniform"),
    Case(_layout(pipeline=2), frozen_head=True, taps=(4,), recompute="block", loss_scale=1024.0),
    Case(_layout(pipeline=4), taps=(1, 3, 5, 7), recompute="selective"),
    Case(_layout(pipeline=4), tied=True, taps=(4, 5), more_rows=2),
    Case(_layout(pipeline=2, virtual=2), taps=(2, 3, 6), recompute="uniform"),
    Case(_layout(pipeline=2, virtual=2), tied=True, taps=(1, 5), frozen_head=True),
    Case(_layout(tensor=2, pipeline=2, sp=True), taps=(3, 4), recompute="block"),
    Case(_layout(tensor=2, pipeline=2, sp=True), tied=True, taps=(2, 4, 6)),
    Case(data=2, taps=(5,), distributed_optimizer=True, overlap=True),
    Case(_layout(pipeline=2), data=2, taps=(2, 6), distributed_optimizer=True, overlap=True),
    Case(_layout(pipeline=2), data=2, tied=True, taps=(3,), distributed_optimizer=True),
    Case(_layout(pipeline=4), data=2, tied=True, taps=(3, 5), overlap=True),
]


# ---- the same pairs for everybody ----------------------------------------------------------------


def _pairs() -> list[list[tuple[list[int], list[int], list[int]]]]:
    """One global batch of unequal pairs for each step."""
    generator = torch.Generator().manual_seed(5)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    return [[(some(1, 14), some(1, 12), some(1, 12)) for _ in range(PAIRS)] for _ in range(STEPS)]


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """The policy's and the reference's checkpoint, tied or untied."""
    made: dict[bool, tuple[Path, Path]] = {}

    def make(tied: bool) -> tuple[Path, Path]:
        if tied not in made:
            root = tmp_path_factory.mktemp("tied" if tied else "untied")
            for name, seed in (("policy", 1), ("reference", 2)):
                write_tiny_hf_model(
                    root / name,
                    "llama",
                    seed=seed,
                    tie_word_embeddings=tied,
                    vocab_size=VOCAB,
                    pad_token_id=None,
                    **SIZES,
                )
            made[tied] = (root / "policy", root / "reference")
        return made[tied]

    return make


@pytest.fixture(scope="session")
def expected(directories):
    """The oracle's run, and the reference's log-probabilities."""
    known: dict[Any, Any] = {}

    def compute(case: Case) -> tuple[dict[str, Any], list[dict[int, Tensor]]]:
        key = (case.taps, case.tied, case.frozen_head)
        if key not in known:
            known[key] = _oracle_run(*directories(case.tied), case)
        return known[key]

    return compute


def _oracle_run(policy_dir: Path, reference_dir: Path, case: Case) -> Any:
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (policy_dir, reference_dir)
    )
    run = oracle.train_steps(
        policy,
        reference,
        _pairs(),
        case.taps,
        beta=0.3,
        intermediate_weight=0.4,
        optimizer="adam",
        lr=LR,
        eps=EPS,
        frozen_head=case.frozen_head,
        steps=STEPS,
    )
    with torch.no_grad():
        references = [
            oracle.sequence_logps(reference, pairs, [*case.taps, NUM_LAYERS]) for pairs in _pairs()
        ]
    return run, references


# ---- Megatron's run, on every rank ---------------------------------------------------------------


def megatron_run(directory: str, case: Case, references: list[dict[int, Tensor]]) -> dict[str, Any]:
    """Three steps; this rank's part of gradients, weights and losses."""
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model import ModelOptions, Recompute, build_model
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    checkpoint, architecture = open_hf(Path(directory))
    case.layout.start()
    recompute = {
        "off": Recompute(),
        "selective": Recompute(granularity="selective"),
        "uniform": Recompute(granularity="full", method="uniform", num_layers=1),
        "block": Recompute(granularity="full", method="block", num_layers=1),
    }[case.recompute]
    chunks = build_model(architecture, case.layout, ModelOptions(recompute=recompute))
    load_hf_weights(chunks, checkpoint, architecture)
    if case.frozen_head:
        _freeze_head(chunks)
    objective = Objective(beta=0.3, intermediate_weight=0.4)
    dpo = attach(chunks, layers=case.taps, objective=objective, vocab_size=VOCAB)
    wrapped, optimizer = _with_optimizer(chunks, dpo, case)
    losses, gradients = [], {}
    for step, pairs in enumerate(_pairs()):
        optimizer.zero_grad()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        losses.append(_run_step(dpo, wrapped, pairs, references[step], case))
        _unscale(chunks, case.loss_scale)
        if step == 0:
            gradients = dict(whole_tensors(chunks, architecture, _gradient))
        optimizer.step()
    if case.distributed_optimizer and case.overlap:
        for chunk in wrapped:
            chunk.disable_forward_pre_hook(
                param_sync=True
            )  # the last step's weights are on the way
    weights = {name: value.clone() for name, value in whole_tensors(chunks, architecture)}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def _unscale(chunks: list[Any], loss_scale: float) -> None:
    """What megatron-core's mixed-precision optimizers do; its fp32 optimizer knows no scale."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.div_(loss_scale)


def _gradient(parameter: Any) -> Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if main_grad is None else main_grad.clone()


def _freeze_head(chunks: list[Any]) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(("embedding.", "output_layer.", "decoder.final_layernorm.")):
                parameter.requires_grad_(False)


def _with_optimizer(chunks: list[Any], dpo: Any, case: Case) -> tuple[list[Any], Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = chunks[0].config
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
        bucket_size=2000,
    )
    wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in chunks]
    adam = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        adam_eps=EPS,
        weight_decay=0.0,
        clip_grad=0.0,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(adam, wrapped)
    config.finalize_model_grads_func = dpo.finalize_model_grads
    if case.loss_scale != 1.0:
        config.grad_scale_func = partial(torch.mul, torch.tensor(case.loss_scale))
    if case.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
        if len(wrapped) == 1:
            config.no_sync_func = config.no_sync_func[0]
            config.grad_sync_func = config.grad_sync_func[0]
    return wrapped, optimizer


def _run_step(
    dpo: Any, wrapped: list[Any], pairs: list[Any], reference: dict[int, Tensor], case: Case
) -> dict[int, Tensor]:
    """One global batch through megatron-core's schedule; the sum of each local layer's losses."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batches = _micro_batches(pairs, reference, case)

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        tokens_1T, micro_batch = next(iterator)
        return dpo.forward(model, tokens_1T, micro_batch), partial(dpo.loss, micro_batch)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=ROW_TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )
    sums: dict[int, Tensor] = {}
    for output in dpo.take_outputs(len(batches)):
        sums[output.layer] = sums.get(output.layer, torch.zeros(())) + output.loss_P.sum()
    return sums


def _micro_batches(pairs: list[Any], reference: dict[int, Tensor], case: Case) -> list[Any]:
    """This data-parallel rank's rows of one global batch."""
    import numpy as np
    from megatron.core import parallel_state

    from megatron_idpo.data.packing import plan_rows
    from megatron_idpo.data.pair import Pair
    from megatron_idpo.data.rows import Row
    from megatron_idpo.plugin.micro_batch import MicroBatch, Targets

    tokenised = [
        Pair(number, *(np.array(part, dtype=np.int32) for part in pair))
        for number, pair in enumerate(pairs)
    ]
    lengths = np.array([[len(part) for part in pair] for pair in pairs], dtype=np.int32)
    multiple = case.layout.pipeline if case.layout.virtual_pipeline > 1 else 1
    plan = plan_rows(lengths, row_tokens=ROW_TOKENS, ranks=case.data, multiple=multiple)
    mine = plan.pairs[parallel_state.get_data_parallel_rank()]
    rows = [Row.build([tokenised[n] for n in row], ROW_TOKENS, 0) for row in mine]
    rows += [Row.empty(ROW_TOKENS, 0)] * case.more_rows
    batches = []
    for number, row in enumerate(rows):
        tensors = row.tensors(torch.device("cpu"))
        sequences = [2 * pair + side for pair in row.pair_index_P.tolist() for side in (0, 1)]
        batches.append(
            (
                tensors.tokens_T[None],
                MicroBatch(
                    position_ids_T=tensors.position_ids_T,
                    spans_G4=tensors.spans_G4,
                    targets=Targets(
                        tensors.target_positions_N,
                        tensors.target_tokens_N,
                        tensors.target_sequences_N,
                        row.num_pairs,
                    ),
                    reference_logps={
                        layer: logps[torch.tensor(sequences, dtype=torch.int64)]
                        for layer, logps in reference.items()
                    },
                    index=number,
                    num_micro_batches=len(rows),
                    global_pairs=PAIRS,
                ),
            )
        )
    return batches


# ---- the comparison ------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_the_oracle(case, workers, directories, expected):
    run, references = expected(case)
    policy_dir, _ = directories(case.tied)
    answers = workers.run(megatron_run, case.world_size, str(policy_dir), case, references)
    _compare_losses(run, answers, case)
    gradients = {n: g for answer in answers for n, g in answer["gradients"].items()}
    weights = {n: w for answer in answers for n, w in answer["weights"].items()}
    assert set(weights) == set(run["weights"])
    for name, weight in run["weights"].items():
        gradient = run["gradients"].get(name)
        # The distributed optimizer reduces each rank's part of a gradient to that rank alone.
        if gradient is not None and not case.distributed_optimizer:
            relative = (gradients[name] - gradient).norm() / gradient.norm()
            assert relative <= GRADIENT_RELATIVE, f"{name}: {relative:.2e}"
        moved = (weights[name] - weight).abs().max()
        assert moved <= STEPS_IN_LR * LR, f"{name}: {moved / LR:.2e} lr"


def _compare_losses(run: dict[str, Any], answers: list[dict[str, Any]], case: Case) -> None:
    """Each layer's loss is its pairs' sum over data ranks; tensor ranks say the same."""
    for step, truth in enumerate(run["losses"]):
        for layer, loss in truth.by_layer.items():
            spoken = [a["losses"][step][layer] for a in answers if layer in a["losses"][step]]
            assert len(spoken) == case.data * case.layout.tensor
            total = torch.stack(spoken).sum() / case.layout.tensor / PAIRS
            assert (total - loss).abs() <= LOSS_ABSOLUTE, f"step {step} layer {layer}"
