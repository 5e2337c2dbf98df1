"""One head on several pipeline stages: a copy on every tapping stage, and their gradient sum.

The owner of the output weight is the last stage, or the first with tied embeddings (megatron-core
itself keeps the last stage's tied copy in sync); the owner of the final norm is the last stage. A
tapped chunk without them gets a `HeadReplica`. Frozen replicas of one rank share their memory.

After megatron-core has finished the gradients of a step (data-parallel reduction, embedding
all-reduce, sequence-parallel norms), the gradients of all copies are summed over the stages that
hold one. Every copy then takes the same optimizer step, so the copies stay equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.model.chunk import ModelChunk, RestoreFn, final_norm, logit_map
from megatron_idpo.mcore.model.head_replica import REPLICA_NAME, HeadReplica, mark_shared_head
from megatron_idpo.mcore.parallel.groups import ModelGroups
from megatron_idpo.mcore.parallel.pipeline import StageGroup, stage_group
from megatron_idpo.plugin.head import Head

_INTEGER_BY_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by bytes per element."""


@dataclass(slots=True)
class _Copies:
    """The copies of one parameter on this rank, and the group of stages that hold copies."""

    replicas: list[torch.nn.Parameter] = field(default_factory=list)
    owned: torch.nn.Parameter | None = None
    """The parameter itself, on an owning stage."""

    owned_counts: bool = False
    """Whether the gradient of `owned` enters the sum. False for the last stage's tied copy:
    megatron-core's embedding all-reduce has already added it to the first stage's."""

    stages: StageGroup | None = None

    def fill(self, stages: StageGroup | None, source: int) -> None:
        """Copy the owner's values into every copy. Collective: a broadcast over the stages.

        Args:
            stages: those that hold copies; None if there is no copy in this pipeline.
            source: index of the owner in the stage group: 0 or -1.
        """
        self.stages = stages
        first = next(iter(self.all()), None)
        if stages is not None and first is not None:
            # A model may still be on the CPU, where NCCL cannot reach it.
            values = first.data.to(default_device())
            dist.broadcast(values, src=stages.ranks[source], group=stages.group)
            first.data.copy_(values)
        for replica in self.replicas:
            if first is None or replica is first:
                continue
            if replica.requires_grad:
                replica.data.copy_(first.data)
            else:
                # Frozen: all copies of this rank share one memory.
                replica.data = first.data

    def sum_gradients(self) -> None:
        """Give every copy the sum of all. Collective over the stages: one all-reduce.

        Local copies are added first, so that each stage contributes once to the all-reduce.
        """
        if not self.are_trained:
            return
        total = torch.zeros_like(_gradient(self.all()[0]))
        for replica in self.replicas:
            total += _gradient(replica)
        if self.owned is not None and self.owned_counts:
            total += _gradient(self.owned)
        assert self.stages is not None
        dist.all_reduce(total, group=self.stages.group)
        for parameter in self.all():
            _gradient(parameter).copy_(total)

    @property
    def are_trained(self) -> bool:
        """Whether other stages hold copies and they train. The same on every stage."""
        return self.stages is not None and any(copy.requires_grad for copy in self.all())

    def digests(self, shard: int) -> list[tuple[int, bool, int]]:
        """Of each copy: its tensor-parallel shard, whether it trains, and the sum of its bits.

        Bits are summed as integers, which is exact in any order; a GPU's float sums are not.
        """
        if self.stages is None:
            return []
        digests = []
        for copy in self.all():
            bits = copy.detach().view(_INTEGER_BY_SIZE[copy.element_size()])
            digests.append((shard, copy.requires_grad, int(bits.sum(dtype=torch.int64))))
        return digests

    def all(self) -> list[torch.nn.Parameter]:
        """All copies on this rank, the owned one first."""
        return [*([self.owned] if self.owned is not None else []), *self.replicas]


@dataclass(frozen=True, slots=True)
class _NormParameter:
    """A parameter of the final norm, as its owner has it."""

    name: str
    dtype: torch.dtype
    trains: bool


@dataclass(frozen=True, slots=True)
class _HeadState:
    """What the last stage knows about the head, and stages with copies need."""

    weight_trains: bool
    weight_dtype: torch.dtype
    norm: tuple[_NormParameter, ...]

    @classmethod
    def gather(cls, chunks: Sequence[ModelChunk], groups: ModelGroups) -> "_HeadState":
        """Of the last stages, which agree. Collective over the model."""
        local = [
            cls(
                _weight(chunk, None).requires_grad,
                _weight(chunk, None).dtype,
                tuple(
                    _NormParameter(name, parameter.dtype, parameter.requires_grad)
                    for name, parameter in final_norm(chunk).named_parameters()
                ),
            )
            for chunk in chunks
            if chunk.post_process
        ]
        of_last_stages = [state for by_rank in groups.gather(local) for state in by_rank]
        assert len(set(of_last_stages)) == 1, f"last stages differ: {of_last_stages}"
        return of_last_stages[0]


class SharedHead:
    """All copies of the head on this rank.

    Attributes:
        replicas: by chunk index, where a tapped chunk needs one.
    """

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        tapped: Sequence[bool],
        groups: ModelGroups,
        *,
        use_norm: bool,
    ) -> None:
        """Add replicas to the chunks and fill them. Collective over the model.

        A replica is trainable where the owner's parameter is. A norm that no tap reads is frozen
        and not filled: with overlapped reduction, DDP waits for the gradient of every trainable
        parameter, and this one would never get any.

        Args:
            chunks: this rank's, with their weights loaded, not yet wrapped in DDP.
            tapped: which of them own a tap.
            groups: of the model.
            use_norm: whether taps read through the final norm.
        """
        self._chunks = list(chunks)
        self._groups = groups
        self._use_norm = use_norm
        self._undo: list[RestoreFn] = []
        self.replicas: dict[int, HeadReplica] = {}
        state = _HeadState.gather(chunks, groups)
        for index, (chunk, is_tapped) in enumerate(zip(chunks, tapped, strict=True)):
            if is_tapped and not chunk.post_process:
                owns_weight = chunk.pre_process and chunk.share_embeddings_and_output_weights
                replica = HeadReplica(
                    chunk, groups, with_weight=not owns_weight, dtype=state.weight_dtype
                )
                replica.set_trainable(weight=state.weight_trains, norm=False)
                for parameter in state.norm if use_norm else ():
                    copy = replica.norm.get_parameter(parameter.name)
                    copy.data = copy.data.to(parameter.dtype)
                    copy.requires_grad_(parameter.trains)
                chunk.add_module(REPLICA_NAME, replica)
                self.replicas[index] = replica
        self._weights = self._weight_copies()
        self._norms = {
            parameter.name: self._norm_copies(parameter.name) for parameter in state.norm
        }
        # Creating a group is collective over the model: one for the weights, then one for norms.
        tied = chunks[0].share_embeddings_and_output_weights
        self._connect([self._weights], 0 if tied else -1)
        self._connect(list(self._norms.values()), -1)

    def _connect(self, parameters: Sequence[_Copies], source: int) -> None:
        stages = stage_group(
            self._groups,
            is_member=any(copies.all() for copies in parameters),
            needs_group=any(copies.replicas for copies in parameters),
        )
        for copies in parameters:
            copies.fill(stages, source)
            if copies.owned is not None and stages is not None:
                self._undo.append(mark_shared_head(copies.owned, is_owner=True))

    @property
    def has_trained_copies(self) -> bool:
        """Whether other stages hold trained copies of this rank's parameters."""
        return any(copies.are_trained for copies in self._all_copies().values())

    def sum_gradients(self) -> None:
        """Sum the copies' gradients. Collective over the stages that hold a copy."""
        for copies in self._all_copies().values():
            copies.sum_gradients()

    def check_equal(self) -> None:
        """Compare all copies of each parameter. Collective over the model; reads each copy once.

        Raises:
            ConfigError: on every rank, if they differ in value or in whether they train.
        """
        parameters, shard = self._all_copies(), self._groups.tensor_rank
        digests_by_rank = self._groups.gather(
            [copies.digests(shard) for copies in parameters.values()]
        )
        for column, name in enumerate(parameters):
            for shard in range(self._groups.tensor_size):
                digests = {
                    digest
                    for of_rank in digests_by_rank
                    for digest in of_rank[column]
                    if digest[0] == shard
                }
                if len(digests) > 1:
                    raise ConfigError.at(
                        "attach",
                        f"the copies of the {name} on the stages are not equal, "
                        "or only some of them train",
                        "load weights and freeze parameters before attaching, or load with "
                        "checkpoint.weights.load_weights, which fills every copy",
                    )

    def head(self, index: int, *, vocab_size: int) -> Head | None:
        """The head of chunk `index`; None for a chunk without taps or output layer."""
        chunk, replica = self._chunks[index], self.replicas.get(index)
        if replica is None and not chunk.post_process:
            return None
        groups = self._groups
        rows = chunk.vocab_size // groups.tensor_size
        return Head(
            norm=final_norm(chunk) if replica is None else replica.norm,
            weight=partial(_weight, chunk, replica),
            group=groups.tensor,
            context_group=groups.context,
            vocab_start=groups.tensor_rank * rows,
            vocab_size=vocab_size,
            sequence_parallel=chunk.config.sequence_parallel,
            logit_map=logit_map(chunk),
            use_norm=self._use_norm,
            replica=replica,
            # A tied embedding has run before any layer.
            owner=chunk.output_layer if replica is None else None,
        )

    def remove(self) -> None:
        """Remove the replicas from their chunks. A second call does nothing."""
        for index in self.replicas:
            delattr(self._chunks[index], REPLICA_NAME)
        self.replicas = {}
        while self._undo:
            self._undo.pop()()

    def _weight_copies(self) -> _Copies:
        chunks = self._chunks
        replicas = [r.weight for r in self.replicas.values() if r.weight is not None]
        if not chunks[0].share_embeddings_and_output_weights:
            owners = [chunk.output_layer.weight for chunk in chunks if chunk.post_process]
            return _Copies(replicas, next(iter(owners), None), owned_counts=bool(owners))
        first = [c.embedding.word_embeddings.weight for c in chunks if c.pre_process]
        last = [c.output_layer.weight for c in chunks if c.post_process and not c.pre_process]
        return _Copies(replicas, next(iter(first or last), None), owned_counts=bool(first))

    def _norm_copies(self, name: str) -> _Copies:
        replicas = [r.norm.get_parameter(name) for r in self.replicas.values() if self._use_norm]
        norms = [
            final_norm(chunk).get_parameter(name) for chunk in self._chunks if chunk.post_process
        ]
        return _Copies(replicas, next(iter(norms), None), owned_counts=bool(norms))

    def _all_copies(self) -> dict[str, _Copies]:
        """By name of the parameter, in the same order on every rank."""
        norms = {f"final norm's {name}": copies for name, copies in self._norms.items()}
        return {"output weight": self._weights, **norms}


def _weight(chunk: ModelChunk, replica: HeadReplica | None) -> Tensor:
    """The output weight that a chunk uses: a replica's, its tied embedding's, or its own."""
    if replica is not None and replica.weight is not None:
        return replica.weight
    if chunk.share_embeddings_and_output_weights and chunk.pre_process:
        weight: Tensor = chunk.embedding.word_embeddings.weight
    else:
        weight = chunk.output_layer.weight
    return weight


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The tensor that accumulates a parameter's gradient: DDP's buffer, or `grad` without DDP."""
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        return main_grad
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
