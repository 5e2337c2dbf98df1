"""Signals: remembered within the block, as before after it."""

import os
import signal

import pytest

from megatron_idpo.mcore.parallel.signals import STOPPING, listening


@pytest.mark.parametrize("number", STOPPING)
def test_a_stopping_signal_is_remembered(number: signal.Signals) -> None:
    with listening() as stop_flag:
        assert not stop_flag.is_there
        os.kill(os.getpid(), number)
        assert stop_flag.is_there and stop_flag.signal == number


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with listening():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
