"""What curves were made of: written, read again, refused where it is damaged."""

from pathlib import Path

import pytest

from megatron_idpo.config.run_config import SECTIONS, load_config
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.likelihood.settings import FILE, read_made_of, write_made_of
from megatron_idpo.evaluate.models import Subject


def test_it_names_all_that_curves_depend_on(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: sft, dtype: fp32}\ndata: {train: t}\nobjective: {beta: 1.0}\n")
    models = [Subject("dpo", "runs/dpo/hf"), Subject("a", "sft", Path("adapter"))]
    readings = {"the reference": "logps/1", "dpo": "logps/2", "a": "logps/3"}
    write_made_of(tmp_path / "out", load_config(file, optional=SECTIONS), models, readings)
    assert read_made_of(tmp_path / "out") == {
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
def test_another_file_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match="make it by `likelihood`"):
        read_made_of(tmp_path)
