"""One head on several stages: giving every stage its copy, and adding up what the copies learn.

The owner of the output weight is the last stage, or the first where embeddings are tied (the last
stage's copy is megatron-core's own affair); the owner of the final norm is the last stage. A tapped
chunk without them gets a `HeadReplica`. Frozen replicas of one rank share their memory.

After megatron-core has finished the gradients of a step (data-parallel reduction, its own embedding
all-reduce, sequence-parallel norms), the gradients of all copies are summed over the stages that
hold one, so that every copy takes the same step and they stay equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.model.chunk import Undo
from megatron_idpo.mcore.model.head_replica import REPLICA_NAME, HeadReplica, mark_shared_head
from megatron_idpo.mcore.parallel.groups import StageGroup, stage_group, tensor_group, this_rank
from megatron_idpo.mcore.parallel.world import gathered
from megatron_idpo.plugin.head import Head, VocabShard

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""


@dataclass(slots=True)
class _Copies:
    """The copies of one parameter on this rank, and the stages that have some."""

    replicas: list[torch.nn.Parameter] = field(default_factory=list)
    owned: torch.nn.Parameter | None = None
    """The parameter itself, on an owning stage."""

    speaks: bool = False
    """Whether `owned` holds the owner's gradient; the last stage's tied copy already holds the
    first stage's too, so it only listens."""

    stages: StageGroup | None = None

    def connect(self) -> None:
        """Find the other stages. Collective over the world."""
        self.stages = stage_group(
            takes_part=bool(self.replicas) or self.owned is not None,
            needs_it=bool(self.replicas),
        )

    def fill(self, source: int) -> None:
        """Take the owner's values. Collective over the stages: a broadcast, no gradient.

        Args:
            source: the owner's place among the stages: 0 or -1.
        """
        first = self.owned if self.owned is not None else next(iter(self.replicas), None)
        if self.stages is not None and first is not None:
            dist.broadcast(first.data, src=self.stages.ranks[source], group=self.stages.group)
        for replica in self.replicas:
            if first is None or replica is first:
                continue
            if replica.requires_grad:
                replica.data.copy_(first.data)
            else:
                replica.data = first.data

    def sum_gradients(self) -> None:
        """Give every copy the sum. Collective over the stages: an all-reduce of the gradient."""
        if not self.learn_together:
            return
        heard = self._all()
        spoken = [*self.replicas, *([self.owned] if self.owned is not None and self.speaks else [])]
        total = torch.zeros_like(_gradient(heard[0]))
        for parameter in spoken:
            total += _gradient(parameter)
        assert self.stages is not None
        dist.all_reduce(total, group=self.stages.group)
        for parameter in heard:
            _gradient(parameter).copy_(total)

    @property
    def learn_together(self) -> bool:
        """Whether there are copies on other stages, and they learn."""
        # Alike on every stage, see `_trainable`.
        return self.stages is not None and any(one.requires_grad for one in self._all())

    def digests(self) -> list[tuple[int, bool, int]]:
        """What tells copies apart: which shard, whether it learns, and the sum of its bits.

        Integers add up to the same in any order; a GPU sums floats in an order of its own.
        """
        shard = this_rank().tensor
        return [
            (shard, one.requires_grad, int(bits.sum(dtype=torch.int64)))
            for one in (self._all() if self.stages is not None else [])
            for bits in [one.detach().view(_INTEGERS[one.element_size()])]
        ]

    def _all(self) -> list[torch.nn.Parameter]:
        return [*self.replicas, *([self.owned] if self.owned is not None else [])]


class SharedHead:
    """All copies of the head that this rank holds.

    Attributes:
        replicas: by chunk number, where a tapped chunk needs one.
    """

    def __init__(
        self, chunks: Sequence[GPTModel], tapped: Sequence[bool], *, use_norm: bool
    ) -> None:
        """Add the replicas to the chunks and fill them. Collective over the world.

        A replica is trainable where the owner's parameter is. A norm that no tap reads is no copy:
        frozen and left alone, for DDP waits for the gradient of every trainable parameter where it
        overlaps reduction.

        Args:
            chunks: this rank's, with their weights loaded, not yet wrapped in DDP.
            tapped: which of them own a tap.
            use_norm: whether taps read through the final norm.
        """
        self._chunks = list(chunks)
        self._use_norm = use_norm
        self._undo: list[Undo] = []
        self.replicas: dict[int, HeadReplica] = {}
        train_weight, train_norm = _trainable(chunks)
        for number, (chunk, is_tapped) in enumerate(zip(chunks, tapped, strict=True)):
            if is_tapped and not chunk.post_process:
                own_weight = chunk.pre_process and chunk.share_embeddings_and_output_weights
                replica = HeadReplica(chunk, with_weight=not own_weight)
                replica.set_trainable(weight=train_weight, norm=train_norm and use_norm)
                chunk.add_module(REPLICA_NAME, replica)
                self.replicas[number] = replica
        self._weights = self._weight_copies(chunks)
        self._norms = self._norm_copies(chunks)
        tied = chunks[0].share_embeddings_and_output_weights
        for copies, source in ((self._weights, 0 if tied else -1), (self._norms, -1)):
            copies.connect()
            copies.fill(source)
            if copies.owned is not None and copies.stages is not None:
                self._undo.append(mark_shared_head(copies.owned, is_owner=True))

    @property
    def learns(self) -> bool:
        """Whether other stages hold trained copies of what this rank holds."""
        return self._weights.learn_together or self._norms.learn_together

    def sum_gradients(self) -> None:
        """Add up the copies' gradients. Collective over the stages that hold a copy."""
        self._weights.sum_gradients()
        self._norms.sum_gradients()

    def check_equal(self) -> None:
        """Compare all copies of each parameter. Collective over the world; reads each copy once.

        Raises:
            ConfigError: on every rank, where they differ in value or in whether they learn.
        """
        gathered_digests = gathered([self._weights.digests(), self._norms.digests()])
        rank = this_rank()
        for name, column in (("output weight", 0), ("final norm", 1)):
            for tensor in range(rank.tensor_size):
                known = {
                    digest
                    for digests in gathered_digests
                    for digest in digests[column]
                    if digest[0] == tensor
                }
                if len(known) > 1:
                    raise ConfigError.at(
                        "attach",
                        f"the stages' copies of the {name} are not equal, or do not all learn",
                        "load weights and freeze parameters before attaching, or load by "
                        "checkpoint.weights.load_weights, which fills every copy",
                    )

    def head(self, number: int, *, vocab_size: int) -> Head | None:
        """How chunk `number` reaches the head; None for a chunk that has no use for it."""
        chunk, replica = self._chunks[number], self.replicas.get(number)
        if replica is None and not chunk.post_process:
            return None
        rank = this_rank()
        rows = chunk.vocab_size // rank.tensor_size
        return Head(
            norm=chunk.decoder.final_layernorm if replica is None else replica.norm,
            weight=partial(_weight, chunk, replica),
            shard=VocabShard(tensor_group(), rank.tensor * rows, vocab_size),
            sequence_parallel=chunk.config.sequence_parallel,
            use_norm=self._use_norm,
            replica=replica,
        )

    def remove(self, chunks: Sequence[GPTModel]) -> None:
        """Take the replicas out of their chunks."""
        for number in self.replicas:
            delattr(chunks[number], REPLICA_NAME)
        self.replicas = {}
        while self._undo:
            self._undo.pop()()

    def _weight_copies(self, chunks: Sequence[GPTModel]) -> _Copies:
        replicas = [r.weight for r in self.replicas.values() if r.weight is not None]
        if not chunks[0].share_embeddings_and_output_weights:
            owners = [chunk.output_layer.weight for chunk in chunks if chunk.post_process]
            return _Copies(replicas, next(iter(owners), None), speaks=bool(owners))
        first = [c.embedding.word_embeddings.weight for c in chunks if c.pre_process]
        last = [c.output_layer.weight for c in chunks if c.post_process and not c.pre_process]
        owners = first or last
        return _Copies(replicas, next(iter(owners), None), speaks=bool(first))

    def _norm_copies(self, chunks: Sequence[GPTModel]) -> _Copies:
        replicas = [r.norm_weight for r in self.replicas.values() if self._use_norm]
        owners = [chunk.decoder.final_layernorm.weight for chunk in chunks if chunk.post_process]
        return _Copies(replicas, next(iter(owners), None), speaks=bool(owners))


def _weight(chunk: GPTModel, replica: HeadReplica | None) -> Tensor:
    """The output weight as a chunk reaches it: its own, its tied embedding's, or a copy."""
    if replica is not None and replica.weight is not None:
        return replica.weight
    if chunk.share_embeddings_and_output_weights and chunk.pre_process:
        weight: Tensor = chunk.embedding.word_embeddings.weight
    else:
        weight = chunk.output_layer.weight
    return weight


def _trainable(chunks: Sequence[GPTModel]) -> tuple[bool, bool]:
    """Whether the output weight and the final norm learn. Collective: asks the last stages."""
    mine = [
        (_weight(chunk, None).requires_grad, chunk.decoder.final_layernorm.weight.requires_grad)
        for chunk in chunks
        if chunk.post_process
    ]
    message = [answer for answers in gathered(mine) for answer in answers]
    assert len(set(message)) == 1, f"the last stages disagree on what learns: {message}"
    return message[0]


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Where a parameter's gradient is accumulated: DDP's buffer, or `grad` without DDP."""
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        return main_grad
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
