"""A process that fails and cannot close its process groups."""

import threading

import pytest

from megatron_idpo.errors import CheckpointError
from megatron_idpo.mcore.watchdog.leaving import leaving_after


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("broken"), 2),
        (RuntimeError("Connection closed by peer"), 3),
        (ZeroDivisionError("a bug"), 1),
    ],
)
def test_a_process_that_cannot_leave_after_an_error_ends_with_its_message(error, code, capfd):
    codes: list[int] = []
    is_ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        is_ended.set()

    with leaving_after(error, limit_s=0.01, end_process=end):
        assert is_ended.wait(60.0), "destroy_process_group() waits for a lost process"
    message = capfd.readouterr().err
    assert codes[0] == code and str(error) in message and f"exit code {code}" in message
    with leaving_after(error, end_process=end):
        before = len(codes)
    assert len(codes) == before
