"""Trainings of stock models: by plain autograd, and with the plugin in any layout.

P  pairs   Q  sequences
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout

from . import stock_model as stock
from . import tiny_megatron as tiny

BATCHES, SEQUENCES, POSITIONS = 4, 4, 24
"""Micro-batches of a step, sequences of a micro-batch (two pairs), positions of a sequence."""

PAIRS = BATCHES * SEQUENCES // 2
BETA, WEIGHT = 0.3, 0.4
STEPS, LR, MOMENTUM = 3, 0.02, 0.9
CONTEXT_MULTIPLE = 4
"""Packed sequences are padded to a multiple of this, so that context parallelism can cut them."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "off": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    **{
        f"{method}-{count}": {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": count,
        }
        for method, count in (("uniform", 1), ("uniform", 3), ("block", 1))
    },
    "distributed": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
        "distribute_saved_activations": True,
    },
}
TAPS = {"middle": (3,), "last": (7,), "several": (1, 2, 4, 6)}


class Sequence(NamedTuple):
    """A prompt with one or several answers."""

    tokens: list[int]
    scored: list[int]
    """Positions of the answers' tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to run the training; every field is a factor of the covering array."""

    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    context: int = 1
    recompute: str = "off"
    taps: str = "several"
    trained: str = "all"
    tied: bool = False
    batch: str = "padded"
    kind: str = "llama"
    per_token: bool = False
    """megatron-core's `calculate_per_token_loss`."""

    def __str__(self) -> str:
        """The id of its test."""
        counts = (self.tensor, self.pipeline, self.virtual, self.data, self.context)
        sizes = zip("TPVDC", counts, strict=True)
        words = [f"{letter}{size}" for letter, size in sizes if size > 1] or ["one"]
        words += ["SP"] if self.sequence_parallel else []
        words += ["tied"] if self.tied else []
        words += ["per_token"] if self.per_token else []
        return "-".join([*words, self.batch, self.kind, self.taps, self.recompute, self.trained])

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def layers(self) -> tuple[int, ...]:
        """The tapped layers."""
        return TAPS[self.taps]


def sequences() -> list[list[Sequence]]:
    """Chosen and rejected sequences of every micro-batch; every third one has two turns."""
    rng = random.Random(5)

    def some(least: int, most: int) -> list[int]:
        return [rng.randrange(stock.VOCAB) for _ in range(rng.randint(least, most))]

    batches = []
    for _ in range(BATCHES):
        batch, prompt = [], []
        for index in range(SEQUENCES):
            prompt = some(1, 6) if index % 2 == 0 else prompt
            tokens, scored = list(prompt), []
            for turn in range(1 + (index % 3 == 0)):
                tokens += some(2, 3) if turn else []
                answer = some(1, 4)
                scored += range(len(tokens), len(tokens) + len(answer))
                tokens += answer
            batch.append(Sequence(tokens, scored))
        batches.append(batch)
    return batches


def references() -> dict[int, Tensor]:
    """Reference log-probabilities of all sequences, by layer."""
    generator = torch.Generator().manual_seed(3)
    count = BATCHES * SEQUENCES
    return {layer: -20 - 5 * torch.rand(count, generator=generator) for layer in range(1, 9)}


# ---- plain autograd ------------------------------------------------------------------------------


def oracle(taps: tuple[int, ...], tied: bool, trained: str, kind: str) -> dict[str, Any]:
    """Losses of each step, gradients of the first, weights after the last, by plain autograd."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    (model,) = stock.build(Layout(), kind, tied=tied, frozen=trained == "frozen_head")
    layers = (*taps, stock.NUM_LAYERS)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=LR, momentum=MOMENTUM)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        by_layer = {layer: torch.zeros(()) for layer in layers}
        reference = references()
        for index, batch in enumerate(sequences()):
            logps = [stock.sequence_logps(model, sequence, layers) for sequence in batch]
            total = torch.zeros(())
            for layer in layers:
                own = slice(index * SEQUENCES, (index + 1) * SEQUENCES)
                ratio = torch.stack([one[layer] for one in logps]) - reference[layer][own]
                loss = -torch.nn.functional.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).sum()
                by_layer[layer] = by_layer[layer] + loss.detach()
                scale = 1 - WEIGHT if layer == stock.NUM_LAYERS else WEIGHT / len(taps)
                total = total + scale * loss / PAIRS
            total.backward()
        losses.append(by_layer)
        if step == 0:
            named = model.named_parameters()
            gradients = {name: p.grad.clone() for name, p in named if p.requires_grad}
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights, "start": start}


# ---- with the plugin -----------------------------------------------------------------------------


def micro_batches(layers: tuple[int, ...], case: Case) -> list[Any]:
    """This data-parallel rank's (batch, inputs)."""
    from megatron.core import parallel_state

    from megatron_idpo import PreferenceBatch

    rank = parallel_state.get_data_parallel_rank()
    indices = range(BATCHES)[rank :: case.data]
    made = []
    for number, index in enumerate(indices):
        if case.batch == "packed":
            targets, inputs = packed(sequences()[index])
        else:
            # Attention over context-parallel ranks takes no mask, which hides padding on the left.
            targets, inputs = padded(sequences()[index], left=case.context == 1)
        own = slice(index * SEQUENCES, (index + 1) * SEQUENCES)
        pairs = None
        order = torch.arange(SEQUENCES)
        if index % 2:  # the pairs, and which of a pair's sequences is chosen, may be named
            pairs = torch.tensor([[2, 3], [0, 1]])
            order = pairs.flatten()
        reference = {layer: logps[own][order] for layer, logps in references().items()}
        batch = PreferenceBatch(
            targets,
            pairs=pairs,
            reference_logps={layer: reference[layer] for layer in layers},
            index=number,
            num_micro_batches=len(indices),
            global_pairs=PAIRS,
        )
        made.append((batch, inputs))
    return made


def padded(batch: list[Sequence], *, left: bool) -> tuple[Any, dict[str, Any]]:
    """`[B, S]`; every second row is padded on the left, if wanted."""
    from megatron_idpo import Targets

    tokens_BS = torch.full((len(batch), POSITIONS), stock.VOCAB - 1)
    mask_BS = torch.zeros(len(batch), POSITIONS, dtype=torch.bool)
    ids_BS = torch.zeros(len(batch), POSITIONS, dtype=torch.int64)
    hidden_B1SS = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1).repeat(4, 1, 1, 1)
    for row, (tokens, scored) in enumerate(batch):
        start = POSITIONS - len(tokens) if left and row % 2 else 0
        tokens_BS[row, start : start + len(tokens)] = torch.tensor(tokens)
        ids_BS[row, start : start + len(tokens)] = torch.arange(len(tokens))
        mask_BS[row, [start + at for at in scored]] = True
        hidden_B1SS[row, :, start:, :start] = True
    inputs = {"input_ids": tokens_BS, "position_ids": ids_BS, "attention_mask": hidden_B1SS}
    return Targets.from_mask(tokens_BS, mask_BS), inputs


def packed(batch: list[Sequence]) -> tuple[Any, dict[str, Any]]:
    """One row of sequences one after another, each padded at its end."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_idpo import Targets

    total = SEQUENCES * POSITIONS
    tokens_S, ids_S = torch.full((total,), stock.VOCAB - 1), torch.zeros(total, dtype=torch.int64)
    mask_S = torch.zeros(total, dtype=torch.bool)
    bounds = [0]
    for tokens, scored in batch:
        start = bounds[-1]
        tokens_S[start : start + len(tokens)] = torch.tensor(tokens)
        ids_S[start : start + len(tokens)] = torch.arange(len(tokens))
        mask_S[[start + at for at in scored]] = True
        bounds.append(start - (-len(tokens) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE)
    bounds.append(total)  # padding is a last sequence without targets
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    inputs = {
        "input_ids": tokens_S[None],
        "position_ids": ids_S[None],
        "attention_mask": None,
        "packed_seq_params": params,
    }
    return Targets.from_packed(tokens_S[None], cu_seqlens, mask_S[None]), inputs


def start(case: Case) -> None:
    """Create the process groups; our own layouts have no context parallelism."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        virtual_pipeline_model_parallel_size=case.virtual if case.virtual > 1 else None,
        context_parallel_size=case.context,
    )
    model_parallel_cuda_manual_seed(1)


def train(case: Case) -> dict[str, Any]:
    """This rank's losses of each step, gradients of the first, weights after the last, and logs."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_idpo import Objective, attach
    from megatron_idpo.mcore.model.build import global_parameters

    start(case)
    chunks = stock.build(
        case.layout,
        case.kind,
        tied=case.tied,
        frozen=case.trained == "frozen_head",
        packed=case.batch == "packed" or case.context > 1,
        context_parallel_size=case.context,
        calculate_per_token_loss=case.per_token,
        **RECOMPUTE[case.recompute],
    )
    objective = Objective(beta=BETA, intermediate_weight=WEIGHT)
    dpo = attach(chunks, layers=case.layers, objective=objective, vocab_size=stock.VOCAB)
    models = tiny.wrap(dpo, chunks)
    sgd = OptimizerConfig(
        optimizer="sgd", lr=LR, sgd_momentum=MOMENTUM, weight_decay=0.0, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(sgd, models)
    batches = micro_batches((*case.layers, stock.NUM_LAYERS), case)
    losses, gradients, logs = [], {}, []
    for step in range(STEPS):
        optimizer.zero_grad()
        for model in models:
            model.zero_grad_buffer()
        outputs, log = run_step(dpo, models, batches, case)
        losses.append({layer: p.sum() for layer, p in tiny.by_layer(outputs, "loss_P").items()})
        logs.append(log_means(log))
        if step == 0:
            gradients = tiny.gradients(chunks)
        optimizer.step()
    parameters = dict(global_parameters(chunks))
    return {
        "losses": losses,
        "logs": logs,
        "gradients": gradients,
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "cuts": {name: stock.Cut.of(p) for name, p in parameters.items()},
    }


def run_step(
    dpo: Any, models: list[Any], batches: list[Any], case: Case, *, forward_only: bool = False
) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """One global batch through the schedule; the outputs, and what the loss function returned."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Any, model: Any) -> Any:
        batch, inputs = next(iterator)
        bounds = batch.targets.bounds
        own = {
            name: stock.context_shard(value, bounds) if name.endswith("ids") else value
            for name, value in inputs.items()
        }
        if case.context > 1:
            own["attention_mask"] = None
        mine = own.pop("packed_seq_params", None)
        # The user's own call; labels have no effect.
        output = model(**own, labels=own["input_ids"], **dpo.model_kwargs(batch, mine))
        return output, partial(dpo.loss, batch)

    is_packed = case.batch == "packed"
    with torch.set_grad_enabled(not forward_only), dpo.collect_outputs(len(batches)) as outputs:
        log = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in models],
            model=models,
            num_microbatches=len(batches),
            seq_length=SEQUENCES * POSITIONS if is_packed else POSITIONS,
            micro_batch_size=1 if is_packed else SEQUENCES,
            forward_only=forward_only,
        )
    return outputs, log


def log_means(log: list[dict[str, Tensor]]) -> dict[str, float]:
    """As `megatron.training.training.train_step` reduces what the loss function returned."""
    from megatron.core import parallel_state

    if not log:
        return {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    means = {}
    for name in log[0]:
        value = torch.vstack([part[name].view(-1) for part in log]).sum(dim=0)
        torch.distributed.all_reduce(value, group=group)
        means[name] = float(value[0] / value[1])
    return means
