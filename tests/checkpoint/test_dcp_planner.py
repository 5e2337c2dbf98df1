"""Tensor chunks written by some ranks and read back as other chunks."""

from pathlib import Path

import pytest
import torch

from megatron_idpo.checkpoint.tensor_chunks import TensorChunk
from megatron_idpo.errors import CheckpointError

pytestmark = pytest.mark.distributed

ROWS, COLUMNS = 6, 4


def whole() -> torch.Tensor:
    return torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)


def chunk_of(
    tensor: torch.Tensor, offset: tuple[int, int], size: tuple[int, int], **fields
) -> TensorChunk:
    part = tensor[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
    return TensorChunk("w", tuple(tensor.shape), offset, part.clone(), **fields)


def write(directory: str) -> str | None:
    """Rank 0 writes the first ten elements, rank 1 the others; returns this rank's error."""
    import torch.distributed as dist

    from megatron_idpo.checkpoint.dcp_planner import write_chunks

    pieces = [[((0, 0), (2, 4)), ((2, 0), (1, 2))], [((2, 2), (1, 2)), ((3, 0), (3, 4))]][
        dist.get_rank()
    ]
    chunks = [chunk_of(whole(), *piece) for piece in pieces]
    group = dist.new_group(backend="gloo")
    try:
        write_chunks(chunks, Path(directory), group, location=Path("shown"))
    except CheckpointError as error:
        return str(error)
    return None


def read(directory: str, pieces: list) -> list[list[list[float]]]:
    """The values of chunks, given as whole shape, offset, size, other fields."""
    from megatron_idpo.checkpoint.dcp_planner import read_chunks

    chunks = [
        chunk_of(torch.full(shape, -1.0), offset, size, **fields)
        for shape, offset, size, fields in pieces
    ]
    read_chunks(chunks, Path(directory))
    return [chunk.tensor.tolist() for chunk in chunks]


def test_chunks_of_another_layout_are_read(workers, tmp_path):
    assert workers.run(write, 2, str(tmp_path)) == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    shape = (ROWS, COLUMNS)
    pieces = [(shape, (0, 0), shape, {}), (shape, (1, 1), (3, 2), {}), (shape, (5, 3), (1, 1), {})]
    ((everything, middle, corner),) = workers.run(read, 1, str(tmp_path), pieces)
    assert everything == whole().tolist()
    assert middle == whole()[1:4, 1:3].tolist()
    assert corner == [[23.0]]


def test_padded_tensor_is_truncated_or_filled_with_zeros(workers, tmp_path):
    workers.run(write, 2, str(tmp_path))
    padded = {"padded": True}
    longer, shorter = (8, COLUMNS), (5, COLUMNS)
    pieces = [(longer, (4, 0), (4, 4), padded), (shorter, (0, 0), shorter, padded)]
    ((last, cut),) = workers.run(read, 1, str(tmp_path), pieces)
    assert last == [*whole()[4:].tolist(), [0.0] * 4, [0.0] * 4]
    assert cut == whole()[:5].tolist()


def test_missing_elements_are_an_error(workers, tmp_path):
    workers.run(write, 2, str(tmp_path))
    longer = (8, COLUMNS)
    with pytest.raises(AssertionError, match="not all of w is in the checkpoint"):
        workers.run(read, 1, str(tmp_path), [(longer, (4, 0), (4, 4), {})])


def test_flipped_bit_is_detected(workers, tmp_path):
    workers.run(write, 2, str(tmp_path))
    file = tmp_path / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    location = content.find(whole()[3:].numpy().tobytes())
    content[location + 1] ^= 1
    file.write_bytes(content)
    shape = (ROWS, COLUMNS)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: tensor 'w' cannot be read"):
        workers.run(read, 1, str(tmp_path), [(shape, (0, 0), shape, {})])


def test_failed_write_is_raised_on_all_ranks(workers, tmp_path):
    (tmp_path / "__1_0.distcp").mkdir()
    message = "shown/__1_0.distcp: the first tensor cannot be written: Is a directory"
    assert workers.run(write, 2, str(tmp_path)) == [message, message]
