"""Silence is kept about what is listed, and about nothing else."""

import logging
import warnings

import pytest

from megatron_idpo.mcore.quiet import quiet_megatron

GPT = logging.getLogger("megatron.core.models.gpt.gpt_model")


def test_listed_warnings_are_left_unsaid_and_others_heard():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet_megatron():
            warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
            warnings.warn("the disk is on fire", stacklevel=1)
        warnings.warn("Apex is not installed. And this is outside", stacklevel=1)
    told = [str(warning.message) for warning in heard]
    assert told == ["the disk is on fire", "Apex is not installed. And this is outside"]


def test_listed_records_are_dropped_from_their_logger_alone(caplog: pytest.LogCaptureFixture):
    other = logging.getLogger("somebody.else")
    with quiet_megatron():
        with quiet_megatron():
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
    with pytest.raises(ZeroDivisionError), quiet_megatron():
        raise ZeroDivisionError
    assert not GPT.filters
