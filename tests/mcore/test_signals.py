"""Signals: remembered within the block, as before after it."""

import os
import signal

import pytest

from megatron_idpo.mcore.parallel.world import STOP_SIGNALS, catch_stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stopping_signal_is_remembered(number: signal.Signals) -> None:
    with catch_stop_signals() as stop_flag:
        assert not stop_flag.stop_requested
        os.kill(os.getpid(), number)
        assert stop_flag.stop_requested and stop_flag.signal == number


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with catch_stop_signals():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
