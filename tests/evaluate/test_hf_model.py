"""Loading of Transformers models; `load_hf_model` is tested through its callers."""

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from megatron_idpo.api import Result
from megatron_idpo.config.data import ModelConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.evaluate.hf_model import hide_loading_bar
from megatron_idpo.evaluate.lm_eval.tasks import LmEvalModel
from megatron_idpo.evaluate.models import EvalModel
from tests.convert.checked_file import write_checked


@pytest.mark.parametrize("verb", ["h4", "api"])
def test_changed_weights_of_an_export_are_refused(tmp_path: Path, verb: str) -> None:
    file = tmp_path / "hf" / "model.safetensors"
    file.parent.mkdir()
    write_checked(file, {"a": torch.arange(4.0)})
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=str(file)):
        if verb == "api":
            Result(tmp_path, is_complete=True).model()
        else:
            model = EvalModel("trained", str(file.parent))
            LmEvalModel(ModelConfig(path=str(file.parent)), model, 1)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_loading_bar_is_hidden_and_restored(is_enabled: bool) -> None:
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if is_enabled else logging.disable_progress_bar)()
        with pytest.raises(ZeroDivisionError), hide_loading_bar():
            assert not logging.is_progress_bar_enabled()
            _ = 1 / 0
        assert logging.is_progress_bar_enabled() == is_enabled
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
