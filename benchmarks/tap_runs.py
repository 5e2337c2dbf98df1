"""The measurements of `tap_cost.py`: steps of a small model with and without a tap, in workers.

A separate module, because workers import functions by their module's name, and a script has none.

    T  row positions   N  targets   H  hidden size   V  vocabulary
"""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_idpo.testing import tiny_hf_config

PAIR = (52, 163, 95)
"""Prompt, chosen and rejected tokens of a pair: the medians of alpaca_eval_gpt4."""


class Sizes(NamedTuple):
    """A model and its rows."""

    layers: int
    hidden: int
    vocab: int
    row_tokens: int

    @property
    def pairs(self) -> int:
        """Number of pairs that fit into a row."""
        return self.row_tokens // sum(PAIR)

    @property
    def targets(self) -> int:
        """N of a row."""
        return self.pairs * (PAIR[1] + PAIR[2])

    def hf_config(self) -> dict[str, Any]:
        """A Llama of SmolLM-135M's proportions."""
        heads = self.hidden // 64
        return tiny_hf_config(
            "llama",
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            head_dim=64,
            vocab_size=self.vocab,
            max_position_embeddings=self.row_tokens,
        )

    def __str__(self) -> str:
        """The name in the report."""
        return f"{self.layers} layers, H {self.hidden}, V {self.vocab}, T {self.row_tokens}"


# ---- the model and its rows ---------------------------------------------------------------------


def build_chunk(sizes: Sizes, pipeline: int, recompute: str) -> Any:
    """This rank's stage, with random weights."""
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import ModelOptions, Recompute, build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    layout = Layout(pipeline=pipeline)
    start_layout(layout)
    granularity: Any = "off" if recompute == "off" else "full"
    options = ModelOptions(recompute=Recompute(granularity=granularity))
    (chunk,) = build_model(Architecture.from_hf(sizes.hf_config()), layout, options)
    for parameter in chunk.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    return chunk


def set_head_trainable(chunk: Any, trains: bool) -> None:
    """Freeze or train embedding, final norm and output layer."""
    for name, parameter in chunk.named_parameters():
        if name.startswith(("embedding.", "output_layer.", "decoder.final_layernorm.")):
            parameter.requires_grad_(trains)


def wrap(chunk: Any) -> Any:
    """The chunk in megatron-core's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)


def micro_batches(sizes: Sizes, num: int, layers: Sequence[int]) -> list[Any]:
    """Rows of equal pairs with random tokens, and reference log-probabilities."""
    from megatron_idpo.data.packing.rows import Row
    from megatron_idpo.data.pairs import Pair
    from megatron_idpo.plugin.rows import row_micro_batch

    random = np.random.default_rng(0)
    batches = []
    for index in range(num):
        parts = [
            [random.integers(0, sizes.vocab, tokens).astype(np.int32) for tokens in PAIR]
            for _ in range(sizes.pairs)
        ]
        row = Row.build([Pair(n, *part) for n, part in enumerate(parts)], sizes.row_tokens, 0)
        micro_batch = row_micro_batch(
            row,
            torch.device("cpu"),
            reference_logps={layer: torch.zeros(2 * row.num_pairs) for layer in layers},
            index=index,
            num_micro_batches=num,
            global_pairs=num * sizes.pairs,
        )
        batches.append(micro_batch)
    return batches


def run_step(
    dpo: Any,
    model: Any,
    batches: Sequence[Any],
    row_tokens: int,
    observe: Callable[[], object] = lambda: None,
) -> None:
    """Run one global batch on the schedule; call `observe` before every forward pass."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        observe()
        batch, inputs = next(iterator)
        return dpo.forward(model, batch, **inputs), partial(dpo.loss, batch)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=row_tokens,
        micro_batch_size=1,
        forward_only=False,
    )


@contextmanager
def attached(chunk: Any, layers: Sequence[int], sizes: Sizes) -> Iterator[Any]:
    """Attached plain DPO or taps; detached on exit."""
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    dpo = attach([chunk], layers=layers, objective=Objective(), vocab_size=sizes.vocab)
    chunk.config.finalize_model_grads_func = dpo.finalize_model_grads
    yield dpo
    dpo.detach()


# ---- time -------------------------------------------------------------------------------------


class Times(NamedTuple):
    """CPU seconds of each round, and the number of weights for counting FLOPs."""

    rounds: list[tuple[float, float, float]]
    """A plain step, a tapped step, the tap's matrix products."""

    layer_weights: int
    """Elements of all layers' weight matrices."""


def time_case(sizes: Sizes, layer: int, repeats: int, *, frozen: bool) -> Times:
    """Measure plain step, tapped step and the tap's matrix products in turn, in one process."""
    torch.manual_seed(0)
    chunk = build_chunk(sizes, 1, "off")
    set_head_trainable(chunk, not frozen)
    model = wrap(chunk)
    batches = micro_batches(sizes, 1, [layer, sizes.layers])
    hidden_NH = torch.randn(sizes.targets, sizes.hidden)
    weight_VH = chunk.output_layer.weight.detach()

    def step_s(layers: Sequence[int]) -> float:
        with attached(chunk, layers, sizes) as dpo:
            model.zero_grad_buffer()
            begin_s = time.process_time()
            run_step(dpo, model, batches, sizes.row_tokens)
            return time.process_time() - begin_s

    def products_s() -> float:
        begin_s = time.process_time()
        tap_products(hidden_NH, weight_VH, frozen=frozen)
        return time.process_time() - begin_s

    rounds = [(step_s([]), step_s([layer]), products_s()) for _ in range(repeats + 1)]
    layer_weights = sum(p.numel() for p in chunk.decoder.layers.parameters() if p.dim() > 1)
    return Times(rounds[1:], layer_weights)  # the first one is warm-up


def tap_products(hidden_NH: Tensor, weight_VH: Tensor, *, frozen: bool) -> None:
    """The matrix products of one tap, not tiled."""
    logits_NV = hidden_NH @ weight_VH.t()
    if not frozen:
        logits_NV = hidden_NH @ weight_VH.t()
        logits_NV.t() @ hidden_NH
    logits_NV @ weight_VH


# ---- memory -----------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all live tensors that operations have allocated, and their peak."""

    def __init__(self) -> None:
        """Start with no tensors."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and track its results."""
        # Unknown inputs, such as weights, existed before and are not counted.
        self._follow((args, kwargs), is_new=False)
        result = function(*args, **(kwargs or {}))
        self._follow(result, is_new=True)
        return result

    def _follow(self, tree: Any, *, is_new: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._follow_storage(tensor.untyped_storage(), is_new)

    def _follow_storage(self, storage: torch.UntypedStorage, is_new: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if is_new else 0

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


class StageMemory(NamedTuple):
    """Live bytes of one stage in a step."""

    at_forward: list[int]
    """At the start of each micro-batch's forward pass."""

    peak: int


def memory_case(
    sizes: Sizes, stages: int, layers: Sequence[int], recompute: str, *, frozen: bool
) -> StageMemory:
    """Measure one step of 2 * `stages` micro-batches on every stage."""
    torch.manual_seed(0)
    chunk = build_chunk(sizes, stages, recompute)
    set_head_trainable(chunk, not frozen)
    at_forward: list[int] = []
    with attached(chunk, layers, sizes) as dpo:
        model = wrap(chunk)
        batches = micro_batches(sizes, 2 * stages, [*layers, sizes.layers])
        with LiveBytes() as tensors:
            run_step(
                dpo,
                model,
                batches,
                sizes.row_tokens,
                observe=lambda: at_forward.append(tensors.live),
            )
    return StageMemory(at_forward, tensors.peak)
