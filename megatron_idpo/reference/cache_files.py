"""The files of a cache: log-probabilities as parquet, values as JSON; each appears whole or not.

One row per pair and layer, pairs ascending, a pair's layers ascending:

    pair: int64    layer: int32    chosen_logps: float32    rejected_logps: float32

Pages carry checksums. Log-probabilities are split by bytes before they are compressed, since the
upper bytes of neighbours are alike and the lower ones are noise: under 8 bytes a row.

Shapes: P pairs, L layers, 2 = chosen, rejected.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.errors import CheckpointError

Logps = NDArray[np.float32]

_COLUMNS = ("pair", "layer", "chosen_logps", "rejected_logps")
_GROUP_ROWS = 1 << 18
_ENCODINGS = {
    "pair": "DELTA_BINARY_PACKED",
    "chosen_logps": "BYTE_STREAM_SPLIT",
    "rejected_logps": "BYTE_STREAM_SPLIT",
}


def write_table(path: Path, logps_PL2: Logps, layers: Sequence[int], *, first: int = 0) -> None:
    """Write the log-probabilities of the pairs `first`, `first + 1`, ...

    Args:
        path: the file, replaced if it is there.
        logps_PL2: float32 [P, L, 2].
        layers: the numbers of the L layers, ascending.
        first: the index of the first pair.

    Raises:
        CheckpointError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.int64(), pa.int32(), pa.float32(), pa.float32())
    schema = pa.schema(
        [pa.field(*column, nullable=False) for column in zip(_COLUMNS, types, strict=True)]
    )
    fresh = _fresh(path)
    step = max(1, _GROUP_ROWS // len(layers))
    try:
        with pq.ParquetWriter(
            fresh,
            schema,
            compression="zstd",
            use_dictionary=["layer"],
            column_encoding=_ENCODINGS,
            write_page_checksum=True,
        ) as writer:
            for start in range(0, len(logps_PL2), step):
                piece_PL2 = logps_PL2[start : start + step]
                pairs = np.arange(first + start, first + start + len(piece_PL2))
                arrays = [
                    np.repeat(pairs, len(layers)),
                    np.tile(np.array(layers, np.int32), len(piece_PL2)),
                    piece_PL2[..., 0].ravel(),
                    piece_PL2[..., 1].ravel(),
                ]
                writer.write_table(pa.table(arrays, schema=schema))
        _publish(fresh, path)
    except OSError as error:
        raise _unwritable(path, error) from None


def read_table(path: Path, layers: Sequence[int], *, wanted: Sequence[int] | None = None) -> Logps:
    """Read log-probabilities back, and check that they are those of these layers, in order.

    Args:
        path: a file of `write_table`.
        layers: that it was written with.
        wanted: those to keep; all if not given.

    Returns:
        float32 [P, L, 2], L those wanted, in that order.

    Raises:
        CheckpointError: the file is damaged, or another one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [list(layers).index(layer) for layer in (layers if wanted is None else wanted)]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if tuple(file.schema_arrow.names) != _COLUMNS:
                raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
            logps_PL2 = np.empty((file.metadata.num_rows // len(layers), len(kept), 2), np.float32)
            first, done = None, 0
            for number in range(file.num_row_groups):
                columns = [column.to_numpy() for column in file.read_row_group(number).columns]
                pair_R, layer_R = columns[:2]
                first = int(pair_R[0]) if first is None else first
                count = len(pair_R) // len(layers)
                expected = np.arange(first + done, first + done + count)
                if not (
                    np.array_equal(pair_R, np.repeat(expected, len(layers)))
                    and np.array_equal(layer_R, np.tile(layers, count))
                ):
                    raise ValueError(f"not every pair has the layers {', '.join(map(str, layers))}")
                both_PL2 = np.stack([c.reshape(count, -1) for c in columns[2:]], axis=2)
                logps_PL2[done : done + count] = both_PL2[:, kept]
                done += count
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from None
    return logps_PL2


def write_json(path: Path, values: Any) -> None:
    """Write a small file, which is replaced in one step.

    Raises:
        CheckpointError: it cannot be written.
    """
    fresh = _fresh(path)
    try:
        fresh.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        _publish(fresh, path)
    except OSError as error:
        raise _unwritable(path, error) from None


def make_directory(path: Path) -> None:
    """Make a directory and its parents.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def damaged(path: Path, error: Exception | str) -> CheckpointError:
    """What to say of a file that cannot be what it should be."""
    message = str(error).split("\n", 1)[0]
    return CheckpointError.at(
        str(path),
        f"is no reference cache, or a damaged one ({message})",
        "delete it to score again",
    )


def _fresh(path: Path) -> Path:
    """Where a file is written before it has its name; one process writes a cache."""
    return path.with_name(f".{path.name}.incomplete")


def _publish(fresh: Path, path: Path) -> None:
    """To the disk first, then under its name: a kill leaves the old file, the new one or none."""
    _sync(fresh)
    os.replace(fresh, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    remedy = "free some space, or name another directory in reference.cache"
    return CheckpointError.at(str(path), f"cannot be written: {error.strerror or error}", remedy)
