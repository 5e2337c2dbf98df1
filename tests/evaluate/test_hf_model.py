"""Transformers' own bar."""

import pytest
from transformers.utils import logging

from megatron_idpo.evaluate.hf_model import hide_loading_bar


@pytest.mark.parametrize("is_wanted", [True, False])
def test_it_is_gone_within_and_after_it_as_before(is_wanted: bool) -> None:
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if is_wanted else logging.disable_progress_bar)()
        with pytest.raises(ZeroDivisionError), hide_loading_bar():
            assert not logging.is_progress_bar_enabled()
            _ = 1 / 0
        assert logging.is_progress_bar_enabled() == is_wanted
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
