"""The table of a reference cache: log-probabilities as a parquet file.

One row per pair and layer, pairs ascending, a pair's layers ascending:

    pair: int64    layer: int32    chosen_logps: float32    rejected_logps: float32

Pages have checksums. Log-probabilities are split into byte streams before compression: the upper
bytes of neighboring values are similar, the lower ones are noise. A row takes less than 8 bytes.

Shapes: P pairs, L layers, 2 = chosen, rejected.
"""

from collections.abc import Buffer, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.errors import CheckpointError
from megatron_idpo.storage.atomic import write_bytes

Logps = NDArray[np.float32]

_COLUMNS = ("pair", "layer", "chosen_logps", "rejected_logps")
_GROUP_ROWS = 1 << 18
_ENCODINGS = {
    "pair": "DELTA_BINARY_PACKED",
    "chosen_logps": "BYTE_STREAM_SPLIT",
    "rejected_logps": "BYTE_STREAM_SPLIT",
}

WRITE_REMEDY = "name another directory in reference.cache"


def encode_table(logps_PL2: Logps, layers: Sequence[int], *, first: int = 0) -> Buffer:
    """The content of a file with the log-probabilities of the pairs `first`, `first + 1`, ...

    Args:
        logps_PL2: float32 [P, L, 2].
        layers: the L layers, ascending.
        first: the index of the first pair.

    Returns:
        A few bytes per row, fewer than the log-probabilities themselves.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_pairs, num_layers = len(logps_PL2), len(layers)
    columns = (
        np.repeat(np.arange(first, first + num_pairs), num_layers),
        np.tile(np.array(layers, np.int32), num_pairs),
        logps_PL2[..., 0].ravel(),
        logps_PL2[..., 1].ravel(),
    )
    types = (pa.int64(), pa.int32(), pa.float32(), pa.float32())
    fields = [pa.field(*column, nullable=False) for column in zip(_COLUMNS, types, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(list(columns), schema=pa.schema(fields)),
        sink,
        # Whole pairs per row group: `read_table` reads group by group.
        row_group_size=max(1, _GROUP_ROWS // num_layers) * num_layers,
        compression="zstd",
        use_dictionary=["layer"],
        column_encoding=_ENCODINGS,
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def write_table(path: Path, content: Buffer) -> None:
    """Write the result of `encode_table`; an existing file is replaced in one step.

    Raises:
        CheckpointError: it cannot be written.
    """
    with CheckpointError.on_os_error(str(path), "cannot be written", WRITE_REMEDY):
        write_bytes(path, content)


def read_table(
    path: Path, layers: Sequence[int], *, selected: Sequence[int] | None = None
) -> Logps:
    """Read log-probabilities, and check that they are those of these layers, in order.

    Args:
        path: a file that was compared with its checksum.
        layers: the layers that it was written with.
        selected: the layers to return; None for all.

    Returns:
        float32 [P, L, 2], L the selected layers, in that order.

    Raises:
        CheckpointError: the file is damaged, or is another table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [list(layers).index(layer) for layer in (layers if selected is None else selected)]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if tuple(file.schema_arrow.names) != _COLUMNS:
                raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
            logps_PL2 = np.empty((file.metadata.num_rows // len(layers), len(kept), 2), np.float32)
            first, done = None, 0
            for group in range(file.num_row_groups):
                pair_R, layer_R, chosen_R, rejected_R = (
                    column.to_numpy() for column in file.read_row_group(group).columns
                )
                first = int(pair_R[0]) if first is None else first
                count = len(pair_R) // len(layers)
                expected = np.arange(first + done, first + done + count)
                if not (
                    np.array_equal(pair_R, np.repeat(expected, len(layers)))
                    and np.array_equal(layer_R, np.tile(layers, count))
                ):
                    raise ValueError(f"not every pair has the layers {', '.join(map(str, layers))}")
                both_PL2 = np.stack([chosen_R, rejected_R], axis=-1).reshape(count, -1, 2)
                logps_PL2[done : done + count] = both_PL2[:, kept]
                done += count
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from None
    return logps_PL2


def damaged(path: Path, error: Exception | str) -> CheckpointError:
    """The error for a file of a cache that is damaged."""
    reason = str(error).split("\n", 1)[0]
    message = f"not a reference cache, or damaged ({reason})"
    remedy = "delete it to score again"
    if isinstance(error, OSError):
        return CheckpointError.of_os_error(str(path), message, error, remedy)
    return CheckpointError.at(str(path), message, remedy)
