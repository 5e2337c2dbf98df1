"""Files of layer curves: round trip, damaged files."""

from pathlib import Path

import numpy as np
import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.likelihood.curves_file import (
    COLUMNS,
    SETTINGS,
    read_curves,
    read_settings,
    write_curves,
    write_settings,
)
from megatron_idpo.evaluate.likelihood.layer_curves import QUANTITIES, Estimate, LayerCurves
from megatron_idpo.evaluate.models import EvalModel


def made_up(name: str, layers: int = 3, seed: int = 0) -> LayerCurves:
    random = np.random.default_rng(seed)
    estimates = {name: Estimate(*random.normal(size=(3, layers))) for name in QUANTITIES}
    estimates["agreement"].value_L[0] = np.nan
    return LayerCurves(name, tuple(range(1, layers + 1)), 200, 40, 5.77, estimates)


def test_written_curves_are_read_back(tmp_path: Path) -> None:
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
        ("", "has no rows"),
        ("a,b\n1,2\n", "not a table of layer curves"),
        (",".join(COLUMNS) + "\n" + ",".join(["sft", "2", *["1"] * (len(COLUMNS) - 2)]), "layers"),
    ],
)
def test_other_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "likelihood.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_curves(tmp_path / "likelihood.csv")


def test_missing_file_names_its_verb(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `likelihood` again"):
        read_curves(tmp_path / "likelihood.csv")


def test_unwritable_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"evaluate\.output: cannot write"):
        write_curves(tmp_path / "file" / "likelihood.csv", [made_up("sft")])


def test_settings_have_everything_that_curves_depend_on(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: sft, dtype: fp32}\ndata: {train: t}\nobjective: {beta: 1.0}\n")
    models = [EvalModel("dpo", "runs/dpo/hf"), EvalModel("a", "sft", Path("adapter"))]
    readings = {"the reference": "logps/1", "dpo": "logps/2", "a": "logps/3"}
    (tmp_path / "out").mkdir()
    write_settings(tmp_path / "out", load_config(file, optional=SECTIONS), models, readings)
    assert read_settings(tmp_path / "out") == {
        "reference": "sft",
        "models": {"dpo": "runs/dpo/hf", "a": "sft with adapter"},
        "beta": 1.0,
        "norm": "final",
        "dtype": "fp32",
        "bootstrap_samples": 2000,
        "seed": 0,
        "readings": readings,
    }


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{}", '{"models": 1, "reference": "", "beta": 1}']
)
def test_other_settings_file_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(DataError, match="run `likelihood` again"):
        read_settings(tmp_path)
