"""A safetensors directory written by all ranks together, and failing on all of them together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megatron_idpo.convert.hf_io.writer import HfWriter
from megatron_idpo.errors import CheckpointError, UserError
from megatron_idpo.mcore.parallel.world import barrier, gathered, is_first_rank, raise_on_all_ranks


def write_together(
    writer: HfWriter,
    tensors: Iterable[tuple[str, Tensor]],
    add_companions: Callable[[Path], None],
) -> None:
    """Write every rank's tensors and publish the directory. Collective over the world.

    Args:
        writer: made with the same arguments on every rank.
        tensors: this rank's to write, by name; gone through to the end even after a failure, since
            making them may need other ranks.
        add_companions: called on the first rank with the incomplete directory, before it appears.

    Raises:
        CheckpointError: on every rank; nothing is left behind.
    """
    with _failing_together(), writer:
        with raise_on_all_ranks("preparing the export"):
            if is_first_rank():
                writer.begin()
        with raise_on_all_ranks("writing the weights"):
            _write(writer, tensors)
            written = writer.flush()
        by_rank = gathered(written)
        with raise_on_all_ranks("finishing the export"):
            if is_first_rank():
                add_companions(writer.incomplete)
                writer.finish([name for names in by_rank[1:] for name in names])
    barrier()


@contextmanager
def _failing_together() -> Iterator[None]:
    """After a `UserError`, raised on all ranks, wait until all have removed what they wrote.

    Else torchrun, told by the first rank that ends, would end the others in the middle of it.
    """
    try:
        yield
    except UserError:
        barrier()
        raise


def _write(writer: HfWriter, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """All tensors; after a failure the rest is dropped, so that no rank waits in a collective."""
    failure: CheckpointError | None = None
    for name, tensor in tensors:
        try:
            if failure is None:
                writer.write(name, tensor)
        except CheckpointError as error:
            failure = error
    if failure is not None:
        raise failure
