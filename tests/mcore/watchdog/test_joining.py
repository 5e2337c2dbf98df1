"""Processes that wait for others to join: how long, and whom they report as missing."""

import threading

import pytest
from torch.distributed import TCPStore

from megatron_idpo.errors import EXIT_PEER_LOST
from megatron_idpo.mcore.watchdog import joining
from megatron_idpo.mcore.watchdog.joining import JoinLimit, announce, join_limit_s
from megatron_idpo.mcore.watchdog.joining import _missing as missing


def test_a_process_that_waits_for_others_to_join_ends_in_time(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended, is_ended = list[int](), threading.Event()

    def end(code: int) -> None:
        ended.append(code)
        is_ended.set()

    with JoinLimit(1e-3, lambda: "rank 1 of 2 did not start", end_process=end):
        assert is_ended.wait(60.0)
    assert ended == [EXIT_PEER_LOST]
    message = capfd.readouterr().err
    assert "error (rank 0): not all processes have joined within 0 s: rank 1 of 2" in message


@pytest.mark.parametrize(("limit_s", "size"), [(1e-3, "1"), (0.0, "2")])
def test_joining_has_no_limit_without_others_or_heartbeats(limit_s, size, monkeypatch):
    ended = list[int]()
    monkeypatch.setenv("WORLD_SIZE", size)
    with JoinLimit(limit_s, end_process=ended.append) as limit:
        assert not limit._timer.is_alive()
    assert ended == []


def test_the_ranks_that_have_not_started_are_named(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "5")
    announce(store, 1)
    assert missing() == "ranks 0, 2-4 of 6 did not start, or cannot be reached"
    for rank in range(5):
        announce(store, rank)
    assert "all have started, but they cannot connect" in missing()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert missing().startswith("ranks 0-4 of 6"), "those of an earlier start"
    del store
    monkeypatch.setattr(joining, "_LOOK_UP_S", 0.1)
    assert missing().startswith("the store at 127.0.0.1:")


@pytest.mark.parametrize(
    ("timeout_s", "heartbeat_timeout_s", "limit_s"), [(1800, 40, 400), (60, 40, 60), (1800, 0, 0)]
)
def test_the_limit_for_joining(timeout_s, heartbeat_timeout_s, limit_s):
    assert join_limit_s(timeout_s, heartbeat_timeout_s) == limit_s
