"""Signals: remembered within the block, as before after it."""

import os
import signal

import pytest

from megatron_idpo.mcore.parallel.signals import STOPPING, listening


@pytest.mark.parametrize("number", STOPPING)
def test_a_stopping_signal_is_remembered(number: signal.Signals) -> None:
    with listening() as wish:
        assert not wish.is_there
        os.kill(os.getpid(), number)
        assert wish.is_there and wish.signal == number


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with listening():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
