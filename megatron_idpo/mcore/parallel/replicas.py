"""Values that all data-parallel ranks hold: each reads or writes a part; read parts are exchanged.

If every rank read everything, 512 ranks with 8 GB of weights each would read 4 TB from the file
system at once. Here every byte is read by one rank of each group of replicas. A failed read must
not leave other ranks in a collective, so reading and exchanging are two phases: read, agree that it
succeeded (`raise_on_all_ranks`), exchange.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

_BUCKET_BYTES = 64 << 20
"""Of small tensors that are sent together; the temporary memory of an exchange."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """The ranks that hold the same values as this one."""

    group: dist.ProcessGroup
    rank: int
    """Of this rank in the group."""

    size: int

    @classmethod
    def running(cls, *, is_expert: bool = False) -> Self:
        """In the running layout: the data- and context-parallel ranks, which have equal parameters.

        Args:
            is_expert: of the parameters of experts, which may have fewer replicas.
        """
        if is_expert:
            group = parallel_state.get_expert_data_parallel_group()
        else:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return cls(group, dist.get_rank(group), group.size())

    def readers(self, sizes_bytes: Sequence[int]) -> list[int]:
        """Which rank of the group reads (or writes) each part, so that all do about as much.

        Args:
            sizes_bytes: of the parts, the same on all replicas.
        """
        loads = [(0, rank) for rank in range(self.size)]
        readers = [0] * len(sizes_bytes)
        # Largest first, each to the rank with the least so far.
        for index in sorted(range(len(readers)), key=lambda part: (-sizes_bytes[part], part)):
            num_bytes, reader = loads[0]
            readers[index] = reader
            heapq.heapreplace(loads, (num_bytes + sizes_bytes[index], reader))
        return readers

    @torch.no_grad()
    def exchange(self, parts: Iterable[tuple[int, Tensor]]) -> None:
        """Fills every part on all replicas from the rank that has read it.

        Collective over the group: one broadcast per large part or bucket of small ones. Bits are
        copied, for every dtype.

        Args:
            parts: reader and view of a parameter; the same parts in the same order on all replicas.
        """
        if self.size == 1:
            return
        by_reader = sorted(parts, key=lambda part: part[0])  # stable
        for reader, own_parts in groupby(by_reader, key=lambda part: part[0]):
            bucket: list[Tensor] = []
            bucket_bytes = 0
            for _, tensor in own_parts:
                if bucket and bucket_bytes + tensor.nbytes > _BUCKET_BYTES:
                    self._broadcast(reader, bucket)
                    bucket, bucket_bytes = [], 0
                bucket.append(tensor)
                bucket_bytes += tensor.nbytes
            self._broadcast(reader, bucket)

    def _broadcast(self, reader: int, bucket: Sequence[Tensor]) -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.broadcast(_bytes(bucket[0]), group_src=reader, group=self.group)
            return
        if self.rank == reader:
            joined = torch.cat([_bytes(tensor.contiguous()) for tensor in bucket])
        else:
            num_bytes = sum(tensor.nbytes for tensor in bucket)
            joined = torch.empty(num_bytes, dtype=torch.uint8, device=bucket[0].device)
        dist.broadcast(joined, group_src=reader, group=self.group)
        if self.rank == reader:
            return
        start = 0
        for tensor in bucket:
            stop = start + tensor.nbytes
            # A copy, because a dtype's alignment may not divide the position in the bucket.
            values = joined[start:stop].clone().view(tensor.dtype)
            tensor.copy_(values.view(tensor.shape))
            start = stop


def is_expert_parameter(parameter: torch.nn.Parameter) -> bool:
    """Whether its gradient is reduced over the replicas of an expert, as megatron-core marks it."""
    return not getattr(parameter, "allreduce", True)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory."""
    return tensor.detach().view(-1).view(torch.uint8)
