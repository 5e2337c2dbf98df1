"""Processes that wait for others to join: how long, and whom they report as missing."""

import os
import socket
import threading
import time

import pytest
from torch.distributed import TCPStore

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED
from megatron_idpo.mcore.watchdog import joining
from megatron_idpo.mcore.watchdog.joining import JoinLimit, announce, join_limit_s
from megatron_idpo.mcore.watchdog.joining import _missing as missing
from megatron_idpo.mcore.watchdog.launch_notes import (
    VARIABLE,
    Launch,
    LaunchEnd,
    NeighborWatch,
    have_joined,
    report_end,
)


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


def watched_start(monkeypatch, launch: Launch, timeout_s: float) -> tuple[JoinLimit, list[int]]:
    """The first rank of one of two machines, which waits for the other; exit codes follow."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for name, value in (variables | {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "BEAT_S", 0.01)
    launch.to_environment()
    monkeypatch.setenv(VARIABLE, os.environ[VARIABLE])  # removed at the end
    ended = list[int]()
    limit = JoinLimit(600.0, lambda: "", heartbeat_timeout_s=timeout_s, end_process=ended.append)
    return limit, ended


def wait_for_end(ended: list[int]) -> None:
    end_s = time.monotonic() + 60.0
    while not ended:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_start_that_a_launcher_reports_as_ended_ends_here_with_its_code(monkeypatch, capfd):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch("127.0.0.1", store.port, "start", fewest=2, most=2)
    limit, ended = watched_start(monkeypatch, launch, 60.0)
    with limit:
        report_end(launch.notes_in(store), LaunchEnd("rank 1 was stopped", EXIT_PREEMPTED))
        wait_for_end(ended)
    assert ended == [EXIT_PREEMPTED]
    assert "error (rank 0): rank 1 was stopped, before all processes" in capfd.readouterr().err


def test_a_process_ends_if_the_launchers_store_has_ended(monkeypatch, capfd):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch("127.0.0.1", store.port, "start", fewest=2, most=2)
    limit, ended = watched_start(monkeypatch, launch, 60.0)
    is_connected = threading.Event()

    def look(watch: NeighborWatch, now_s: float) -> LaunchEnd | None:
        is_connected.set()
        return real_look(watch, now_s)

    real_look = NeighborWatch.look
    monkeypatch.setattr(NeighborWatch, "look", look)
    with limit:
        assert is_connected.wait(60.0)
        del store
        wait_for_end(ended)
    assert ended == [EXIT_PEER_LOST]
    assert f"launchers (127.0.0.1:{launch.port}) has ended, before" in capfd.readouterr().err


def test_a_process_ends_if_the_launchers_store_does_not_answer(monkeypatch, capfd):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        launch = Launch("127.0.0.1", silent.getsockname()[1], "start", fewest=2, most=2)
        limit, ended = watched_start(monkeypatch, launch, 0.1)
        with limit:
            wait_for_end(ended)
    assert ended[0] == EXIT_PEER_LOST
    assert "does not answer, before" in capfd.readouterr().err


def test_nothing_ends_after_all_have_joined(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch("127.0.0.1", store.port, "start", fewest=2, most=2)
    limit, ended = watched_start(monkeypatch, launch, 60.0)
    with limit:
        limit.joined()
        limit._end(LaunchEnd("rank 1 has ended", EXIT_PEER_LOST))
    assert ended == []
    notes = launch.notes_in(store)
    end_s = time.monotonic() + 60.0
    while not have_joined(notes):  # launchers send no more beats
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_process_that_fails_to_join_does_not_report_that_all_have(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch("127.0.0.1", store.port, "start", fewest=2, most=2)
    limit, ended = watched_start(monkeypatch, launch, 60.0)
    with pytest.raises(RuntimeError), limit:
        raise RuntimeError
    assert ended == [] and not have_joined(launch.notes_in(store))


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
