"""Layer curves as CSV: what is written is read again; what is none of ours is refused."""

from pathlib import Path

import numpy as np
import pytest

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.likelihood.curves_file import COLUMNS, read_curves, write_curves
from megatron_idpo.evaluate.likelihood.layer_curves import QUANTITIES, Estimate, LayerCurves


def made_up(name: str, layers: int = 3, seed: int = 0) -> LayerCurves:
    random = np.random.default_rng(seed)
    estimates = {name: Estimate(*random.normal(size=(3, layers))) for name in QUANTITIES}
    estimates["agreement"].value_L[0] = np.nan
    return LayerCurves(name, tuple(range(1, layers + 1)), 200, 40, 5.77, estimates)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = [made_up("sft"), made_up('a, "quoted" name', seed=1)]
    write_curves(tmp_path / "new" / "likelihood.csv", written)
    found = read_curves(tmp_path / "new" / "likelihood.csv")
    for one, other in zip(written, found, strict=True):
        message = [(m.model, m.layers, m.pairs, m.prompts, m.chance_nats) for m in (one, other)]
        assert message[0] == message[1]
        for name in QUANTITIES:
            for mine, theirs in zip(
                (one.estimates[name].value_L, one.estimates[name].low_L),
                (other.estimates[name].value_L, other.estimates[name].low_L),
                strict=True,
            ):
                np.testing.assert_allclose(theirs, mine, rtol=1e-8)
    first = (tmp_path / "new" / "likelihood.csv").read_text().splitlines()
    assert first[0].split(",") == list(COLUMNS)
    assert "nan" not in "".join(first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no row"),
        ("a,b\n1,2\n", "no table of layer curves"),
        (",".join(COLUMNS) + "\n" + ",".join(["sft", "2", *["1"] * (len(COLUMNS) - 2)]), "layers"),
    ],
)
def test_another_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "likelihood.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_curves(tmp_path / "likelihood.csv")


def test_a_missing_file_names_its_verb(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make it by `likelihood`"):
        read_curves(tmp_path / "likelihood.csv")


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot write"):
        write_curves(tmp_path / "file" / "likelihood.csv", [made_up("sft")])
