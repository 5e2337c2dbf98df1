"""Exactly the listed warnings and log records are suppressed."""

import logging
import warnings
from pathlib import Path

import pytest
import torch

from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

GPT = logging.getLogger("megatron.core.models.gpt.gpt_model")


def test_listed_warnings_are_suppressed_and_others_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with suppress_megatron_warnings():
            warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
            warnings.warn("the disk is on fire", stacklevel=1)
        warnings.warn("Apex is not installed. And this is outside", stacklevel=1)
    messages = [str(warning.message) for warning in shown]
    assert messages == ["the disk is on fire", "Apex is not installed. And this is outside"]


def is_shown(message: str, module: str, **options: bool) -> bool:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with suppress_megatron_warnings(**options), suppress_megatron_warnings():
            warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
    return bool(shown)


def test_the_grad_warning_is_suppressed_for_megatrons_optimizers_only():
    leaf = torch.ones(2, requires_grad=True)
    with warnings.catch_warnings(record=True) as emitted:
        warnings.simplefilter("always")
        assert (2 * leaf).grad is None
    message = str(emitted[0].message)
    assert is_shown(message, "megatron_idpo.plugin.attach")
    assert not is_shown(message, "megatron.core.optimizer.optimizer")


@pytest.mark.parametrize("feature", ["sequence parallelism", "async grad allreduce"])
def test_gpu_advice_is_shown_only_with_a_gpu(feature):
    """With the text from megatron-core's source."""
    from megatron.core.tensor_parallel import layers

    start = f"When using {feature} it is recommended to set the "
    rest = "environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1 for "
    source = Path(layers.__file__).read_text()
    assert f'"{start}"' in source and f'"{rest}"' in source
    assert is_shown(start + rest, layers.__name__)
    assert not is_shown(start + rest, layers.__name__, has_gpu=False)


def test_listed_log_records_are_dropped_from_their_logger_only(caplog: pytest.LogCaptureFixture):
    other = logging.getLogger("other.library")
    with suppress_megatron_warnings():
        with suppress_megatron_warnings():
            GPT.warning("GPTModel IS DEPRECATED. Really.")
        GPT.warning("GPTModel IS %s. Still.", "DEPRECATED")
        GPT.warning("gradients are NaN")
        other.warning("GPTModel IS DEPRECATED, from another logger")
    GPT.warning("GPTModel IS DEPRECATED. Outside.")
    assert caplog.messages == [
        "gradients are NaN",
        "GPTModel IS DEPRECATED, from another logger",
        "GPTModel IS DEPRECATED. Outside.",
    ]
    assert not GPT.filters


def test_filters_are_removed_after_an_error():
    with pytest.raises(ZeroDivisionError), suppress_megatron_warnings():
        raise ZeroDivisionError
    assert not GPT.filters
