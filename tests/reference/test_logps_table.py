"""The table of log-probabilities: its columns, its size, and that damage is detected."""

from pathlib import Path

import numpy as np
import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.reference.logps_table import encode_table, read_table, write_table

from .tiny_cache import logps

LIMIT_BYTES = 64_000_000
"""Of 60,000 pairs at 33 layers."""


def test_pyarrow_reads_the_documented_columns(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_table(tmp_path / "x.parquet", encode_table(logps(3), (2, 4), first=5))
    table = pq.read_table(tmp_path / "x.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("pair", "int64"),
        ("layer", "int32"),
        ("chosen_logps", "float"),
        ("rejected_logps", "float"),
    ]
    columns = table.to_pydict()
    assert columns["pair"] == [5, 5, 6, 6, 7, 7]
    assert columns["layer"] == [2, 4] * 3
    np.testing.assert_array_equal(np.float32(columns["chosen_logps"]), logps(3)[..., 0].ravel())
    np.testing.assert_array_equal(np.float32(columns["rejected_logps"]), logps(3)[..., 1].ravel())


def test_selected_layers_of_several_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_idpo.reference.logps_table._GROUP_ROWS", 9)
    values = logps(10, 4)
    write_table(tmp_path / "x.parquet", encode_table(values, (1, 2, 3, 4)))
    np.testing.assert_array_equal(read_table(tmp_path / "x.parquet", (1, 2, 3, 4)), values)
    selected = read_table(tmp_path / "x.parquet", (1, 2, 3, 4), selected=(4, 2))
    np.testing.assert_array_equal(selected, values[:, [3, 1]])


def test_size_of_sixty_thousand_pairs_at_33_layers(tmp_path: Path) -> None:
    """Random mantissas: only the encoding of the other bits can save space."""
    write_table(tmp_path / "x.parquet", encode_table(logps(60_000, 33), range(1, 34)))
    assert (tmp_path / "x.parquet").stat().st_size < LIMIT_BYTES / 2


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7])
def test_changed_byte_is_detected(tmp_path: Path, at: float) -> None:
    path = tmp_path / "x.parquet"
    write_table(path, encode_table(logps(2000), (2, 4)))
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.parquet"):
        read_table(path, (2, 4))


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_truncated_file_is_detected(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.parquet"
    write_table(path, encode_table(logps(), (2, 4)))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.parquet.*delete it"):
        read_table(path, (2, 4))


@pytest.mark.parametrize("layers", [(1, 4), (4,), (1, 2, 4)])
def test_table_of_other_layers_is_refused(tmp_path: Path, layers: tuple[int, ...]) -> None:
    write_table(tmp_path / "x.parquet", encode_table(logps(), (2, 4)))
    with pytest.raises(CheckpointError, match=r"x\.parquet.*not every pair has the layers"):
        read_table(tmp_path / "x.parquet", layers)


def test_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"price": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(CheckpointError, match=r"x\.parquet.*columns are price"):
        read_table(tmp_path / "x.parquet", (2, 4))


def test_unwritable_path_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing.*reference\.cache"):
        write_table(tmp_path / "missing" / "x", encode_table(logps(), (2, 4)))
