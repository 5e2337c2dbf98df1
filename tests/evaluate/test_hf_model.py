"""Loading of Transformers models; `load_hf_model` is tested through its callers."""

import pytest
from transformers.utils import logging

from megatron_idpo.evaluate.hf_model import hide_loading_bar


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
