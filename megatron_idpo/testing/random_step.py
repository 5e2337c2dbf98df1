"""A training step on weights that are not read: for measurements of memory and time.

Everything is the code that trains: the model, adapters, taps, DDP, the optimizer, the schedule. If
this rank is alone in a world of several, what needs other ranks or results is replaced too: checks
between ranks and of results are skipped, and tokens are distributed evenly over experts, whose
number the router would have computed.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.data.packing.batches import Batch
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.data.pairs import Pair
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.optim.state import sharded_params
from megatron_idpo.mcore.parallel.pipeline import StageGroup
from megatron_idpo.plugin import attach, shared_head
from megatron_idpo.reference.sources import AdapterOff
from megatron_idpo.train import policy, step
from megatron_idpo.train.metrics.reduce import reduce_outputs

_OPTIMIZER = "megatron.core.optimizer.optimizer"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher"
_SYNCHRONIZE = "_maybe_dtoh_and_synchronize"
"""What is replaced in megatron-core: reading a norm and counts that no kernel has computed."""

PAIR_TOKENS = 1024
"""Positions of a pair, at most: a quarter for the prompt, the others for two answers."""


def state_bytes(trained: policy.Policy) -> dict[str, int]:
    """Bytes of what is allocated between steps; memory that is shared counts once."""
    seen: set[int] = set()
    named = [item for chunk in trained.trainable.model for item in chunk.named_parameters()]
    buffers = [
        buffer
        for chunk in trained.trainable.model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    adapters = [p.data for name, p in named if ".lora." in f".{name}"]
    owned = {p.data_ptr() for name, p in named if ".head_replica." not in f".{name}"}
    copies = [p.data for name, p in named if ".head_replica." in f".{name}"]
    # Frozen copies next to their owner share its memory.
    copies = [copy for copy in copies if copy.data_ptr() not in owned]
    # A distributed optimizer puts all trained parameters into one buffer: elements, not storages.
    adapter_bytes, head_copy_bytes = _elements_bytes(adapters), _elements_bytes(copies)
    weight_bytes = _storage_bytes([p.data for _, p in named], seen)
    gradient_bytes = sum(buffer.grad_data.nbytes for buffer in buffers)
    shards = sharded_params(trained.trainable.optimizer)
    states = [shard.main for shard in shards]
    states += [t for s in shards for t in s.inner.state[s.main].values() if t.is_cuda]
    return {
        "weight_bytes": weight_bytes - adapter_bytes - head_copy_bytes,
        "adapter_bytes": adapter_bytes,
        "head_copy_bytes": head_copy_bytes,
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": _storage_bytes(states, seen),
    }


def _elements_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


@contextmanager
def random_step(
    config: RunConfig, architecture: Architecture, *, is_alone: bool
) -> Iterator[step.TrainStep]:
    """A `TrainStep` within a running layout. Its reference is `adapter_off`, or else zeros.

    Args:
        config: of the run; its model and data are not read.
        architecture: the model's.
        is_alone: the other ranks of the world do not exist, or kernels compute nothing. Weights are
            uninitialized then, else random, and the reference is always zeros.
    """
    optimizer, dispatcher = resolve_name(_OPTIMIZER), resolve_name(_DISPATCHER)
    gradient_norm, synchronize = optimizer.get_grad_norm_fp32, getattr(dispatcher, _SYNCHRONIZE)
    is_trained = config.lora is None
    dtype = config.model.torch_dtype()
    final_norm = shared_head._NormParameter("weight", dtype, is_trained)
    state = shared_head._HeadState(is_trained, dtype, (final_norm,))

    def reduced(*args: Any, **kwargs: Any) -> Any:
        try:
            return reduce_outputs(*args, **kwargs)
        except AssertionError:  # the other ranks' sums are missing; all work is done
            return SimpleNamespace()

    def norm(*args: Any, **kwargs: Any) -> float:
        gradient_norm(*args, **kwargs)
        return 1.0  # what was read is the root of any number

    alone = [
        (attach, "check_all_ranks", lambda problems, *_, **__: problems),
        (shared_head._HeadState, "gather", lambda *_, **__: state),
        (shared_head, "stage_group", _stage_group),
        (step, "check_losses_finite", lambda *_: None),
        (step, "reduce_outputs", reduced),
        (optimizer, "get_grad_norm_fp32", norm),
        (dispatcher, _SYNCHRONIZE, _evenly_routed(synchronize)),
    ]
    load = (policy, "load_base", _uninitialized if is_alone else _random)
    with ExitStack() as stack:
        for owner, name, value in (load, *(alone if is_alone else ())):
            stack.enter_context(patch.object(owner, name, value))
        start: Any = SimpleNamespace(
            source=SimpleNamespace(architecture=architecture),
            adapter=None,
            identity="x",
            base_identity="x",
        )
        built = policy.build_policy(config, start, show_progress=False)
        # Else the first step compares pairs and heads between ranks.
        built.dpo._is_checked = is_alone
        layers = range(1, architecture.num_layers + 1)

        def logps(batch: Batch) -> Any:
            return [
                {layer: torch.zeros(2 * row.num_pairs, device="cuda") for layer in layers}
                for row in batch.rows
            ]

        reference: Any = SimpleNamespace(is_reference_free=False, logps=logps)
        if config.reference.source == "adapter_off" and not is_alone:
            assert built.adapters is not None
            reference = AdapterOff(built.dpo, built.trainable.model, built.adapters)
        yield step.TrainStep(built, reference, config.objective, 0, str)


def _uninitialized(*_: Any, **__: Any) -> None:
    """In place of reading weights."""


def _random(source: Any, chunks: Any, **_: Any) -> None:
    """Weights with which hidden states stay of the order of 1; norms stay at 1."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)


def _stage_group(groups: Any, *, is_member: bool, needs_group: bool) -> Any:
    """All stages as the group of those that hold a copy: other ranks cannot say that they do."""
    ranks = tuple(torch.distributed.get_process_group_ranks(groups.pipeline))
    stages = StageGroup(groups.pipeline, ranks)
    return stages if is_member and len(ranks) > 1 else None


def _evenly_routed(synchronize: Any) -> Any:
    """The dispatcher's copies of token counts to the host, where kernels have counted nothing."""

    def evenly(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        synchronize(self, point, tokens_per_expert)
        sent = self.routing_map.size(0) * self.config.moe_router_topk
        each = sent // self.num_experts
        assert each * self.num_experts == sent, "choose rows that divide evenly over the experts"
        ranks = self.tp_size * self.ep_size
        if ranks > 1:
            self.input_splits = self.output_splits = [sent // self.ep_size] * self.ep_size
            self.output_splits_tp = torch.full((self.tp_size,), sent)
        counts = torch.full((ranks, self.num_local_experts), each)
        self.num_global_tokens_per_local_expert = counts
        return counts.sum(0)

    return evenly


def full_batch(row_tokens: int, num_rows: int, replicas: int) -> Batch:
    """Full rows: pairs of at most `PAIR_TOKENS`."""
    pairs_per_row = max(row_tokens // PAIR_TOKENS, 1)
    answer = row_tokens // pairs_per_row * 3 // 8
    prompt = row_tokens // pairs_per_row - 2 * answer

    def pair(index: int) -> Pair:
        tokens = np.arange(1, answer + 1, dtype=np.int32)
        prompt_tokens = np.arange(1, prompt + 1, dtype=np.int32)
        return Pair(
            index=index, prompt_tokens=prompt_tokens, chosen_tokens=tokens, rejected_tokens=tokens
        )

    rows = tuple(
        Row.build([pair(row * pairs_per_row + i) for i in range(pairs_per_row)], row_tokens, 0)
        for row in range(num_rows)
    )
    num_pairs = pairs_per_row * num_rows * replicas
    num_tokens = num_rows * row_tokens * replicas
    return Batch(
        rows=rows,
        num_pairs=num_pairs,
        chosen_tokens=answer * num_pairs,
        consumed_pairs=0,
        used_tokens=num_tokens,
        computed_tokens=num_tokens,
    )
