"""Silence is kept about what is listed, and about nothing else."""

import logging
import warnings
from pathlib import Path

import pytest
import torch

from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings

GPT = logging.getLogger("megatron.core.models.gpt.gpt_model")


def test_listed_warnings_are_left_unsaid_and_others_heard():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with suppress_megatron_warnings():
            warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
            warnings.warn("the disk is on fire", stacklevel=1)
        warnings.warn("Apex is not installed. And this is outside", stacklevel=1)
    reason = [str(warning.message) for warning in heard]
    assert reason == ["the disk is on fire", "Apex is not installed. And this is outside"]


def heard_within(message: str, module: str, **options: bool) -> bool:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with suppress_megatron_warnings(**options), suppress_megatron_warnings():
            warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
    return bool(heard)


def test_a_gradient_that_is_none_is_heard_of_where_it_is_ours():
    leaf = torch.ones(2, requires_grad=True)
    with warnings.catch_warnings(record=True) as torchs:
        warnings.simplefilter("always")
        assert (2 * leaf).grad is None
    reason = str(torchs[0].message)
    assert heard_within(reason, "megatron_idpo.plugin.injection")
    assert not heard_within(reason, "megatron.core.optimizer.optimizer")


@pytest.mark.parametrize("what", ["sequence parallelism", "async grad allreduce"])
def test_advice_for_gpus_is_heard_where_there_is_one(what):
    """In the words of megatron-core's own source."""
    from megatron.core.tensor_parallel import layers

    start = f"When using {what} it is recommended to set the "
    rest = "environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1 for "
    source = Path(layers.__file__).read_text()
    assert f'"{start}"' in source and f'"{rest}"' in source
    assert heard_within(start + rest, layers.__name__)
    assert not heard_within(start + rest, layers.__name__, has_gpu=False)


def test_listed_records_are_dropped_from_their_logger_alone(caplog: pytest.LogCaptureFixture):
    other = logging.getLogger("somebody.else")
    with suppress_megatron_warnings():
        with suppress_megatron_warnings():
            GPT.warning("GPTModel IS DEPRECATED. Really.")
        GPT.warning("GPTModel IS %s. Still.", "DEPRECATED")
        GPT.warning("gradients are NaN")
        other.warning("GPTModel IS DEPRECATED, says somebody else")
    GPT.warning("GPTModel IS DEPRECATED. Outside.")
    assert caplog.messages == [
        "gradients are NaN",
        "GPTModel IS DEPRECATED, says somebody else",
        "GPTModel IS DEPRECATED. Outside.",
    ]
    assert not GPT.filters


def test_an_error_ends_the_silence_too():
    with pytest.raises(ZeroDivisionError), suppress_megatron_warnings():
        raise ZeroDivisionError
    assert not GPT.filters
