"""The watchdog of a process: what it prints and when it ends the process.

Tests call `step` with their own clock; the thread runs in the last ones only.
"""

import os
import signal
import subprocess
import threading
from dataclasses import asdict
from typing import Any

import pytest

from megatron_idpo.errors import EXIT_PEER_LOST, ConfigError
from megatron_idpo.mcore.watchdog import activity, watch
from megatron_idpo.mcore.watchdog.activity import IdleTimer, current_activity, doing, progressed
from megatron_idpo.mcore.watchdog.heartbeat import Heartbeat
from megatron_idpo.mcore.watchdog.monitor import Loss, Monitor, PeerState
from megatron_idpo.mcore.watchdog.stuck import stuck_loss
from megatron_idpo.mcore.watchdog.watch import LAUNCHER_PID, Watchdog, launcher_pid, stuck_after_s
from megatron_idpo.testing import WorkerError

from .test_link import linked

TIMEOUT_S, INTERVAL_S, STUCK_S = 40.0, 5.0, 1000.0
OTHER = PeerState(1, "node-b", "step 7, training step", (1, 2))


@pytest.fixture
def clock() -> list[float]:
    """The time of the thread, which a test moves."""
    progressed()
    return [0.0]


@pytest.fixture
def ended() -> list[int]:
    """Exit codes with which the watchdog has ended the process."""
    return []


@pytest.fixture
def watchdog(clock, ended) -> Watchdog:
    idle = IdleTimer(INTERVAL_S)

    def describe() -> PeerState:
        now = current_activity()
        return PeerState(0, "node-a", str(now), (0, 2), idle.idle_s, now.is_timed)

    heartbeat = Heartbeat(describe, Monitor(TIMEOUT_S, INTERVAL_S))
    heartbeat.monitor.heard([OTHER])
    end = {"end_process": ended.append}
    return Watchdog(heartbeat, None, "token", idle=idle, stuck_s=STUCK_S, **end)


def run(watchdog: Watchdog, clock: list[float], seconds: float) -> None:
    """Step as often as the thread does."""
    end_s = clock[0] + seconds
    while clock[0] < end_s:
        clock[0] += watchdog._poll_s
        watchdog.step(clock[0])


def test_a_silent_process_is_named_and_ends_this_one_within_a_minute(watchdog, clock, ended, capfd):
    with doing("training step", step=8, is_timed=True):
        run(watchdog, clock, TIMEOUT_S - INTERVAL_S)
        assert ended == []
        run(watchdog, clock, 60.0 - clock[0])
    assert ended[0] == EXIT_PEER_LOST
    message = capfd.readouterr().err.splitlines()[0]
    assert "error (rank 0): rank 1 (host node-b, pipeline stage 2 of 2) is lost: no hea" in message
    assert "its last message: step 7, training step" in message
    assert "This process was in step 8, training step (report, watch.py:" in message
    assert "exit code 3" in message


def test_a_stuck_main_thread_is_reported_with_its_stack(watchdog, clock, ended, capfd):
    with doing("training step", step=8, is_timed=True):
        while not ended:
            watchdog._heartbeat.monitor.heard([OTHER])  # the other one only waits
            run(watchdog, clock, INTERVAL_S)
    assert STUCK_S <= clock[0] <= STUCK_S + 3 * INTERVAL_S
    message = capfd.readouterr().err
    assert "rank 0 (host node-a, pipeline stage 1 of 2) is lost: no progress for 100" in message
    assert "in test_a_stuck_main_thread_is_reported_with_its_stack" in message


def test_time_that_a_process_was_suspended_is_not_without_progress(watchdog, clock, ended):
    """A scheduler suspends the job in the middle of a step, for hours."""
    with doing("training step", step=8, is_timed=True):
        for _ in range(5):
            watchdog._heartbeat.monitor.heard([OTHER])
            run(watchdog, clock, INTERVAL_S)
            clock[0] += 7200.0
            watchdog.step(clock[0])
    assert ended == []


def test_a_process_ends_with_its_launcher(watchdog, clock, ended, capfd, monkeypatch):
    watchdog.launcher = os.getppid()
    run(watchdog, clock, INTERVAL_S)
    assert ended == []
    monkeypatch.setattr(os, "getppid", lambda: 1)
    run(watchdog, clock, INTERVAL_S)
    assert ended[0] == EXIT_PEER_LOST
    assert "its launcher (process " in capfd.readouterr().err


def test_a_launcher_that_was_killed_while_its_worker_joined_is_known(monkeypatch):
    """Its worker has another parent by then."""
    killed = subprocess.Popen(["true"])
    killed.wait()
    monkeypatch.setenv(LAUNCHER_PID, str(killed.pid))
    assert launcher_pid() == killed.pid != os.getppid()
    for alive in (os.getpid(), os.getppid()):  # a shell between them that waits for the worker
        monkeypatch.setenv(LAUNCHER_PID, str(alive))
        assert launcher_pid() == os.getppid()
    monkeypatch.delenv(LAUNCHER_PID)
    assert launcher_pid() == os.getppid()


@pytest.mark.parametrize("announces", [True, False])
def test_a_loss_is_printed_before_nccl_can_abort_the_process(
    watchdog, clock, ended, capfd, announces
):
    watchdog.announces = announces
    watchdog._heartbeat.monitor.ended(1, "its process has ended")
    run(watchdog, clock, INTERVAL_S)
    for thread in threading.enumerate():
        if thread.name == "announce":
            thread.join()
    message = capfd.readouterr().err
    assert ended == [] and ("rank 1 (host node-b" in message) == announces
    run(watchdog, clock, 10.0)
    assert ended[0] == EXIT_PEER_LOST and "exit code 3" in capfd.readouterr().err


def test_a_message_that_cannot_be_printed_does_not_keep_the_process(watchdog, monkeypatch):
    """Standard error is a pipe that no process reads."""
    is_ended = threading.Event()
    monkeypatch.setattr(watch, "_PRINT_LIMIT_S", 0.0)
    monkeypatch.setattr(watch, "_print", lambda _: is_ended.wait(60.0))
    monkeypatch.setattr(watchdog, "_end_process", lambda _: is_ended.set())
    watchdog._heartbeat.monitor.ended(1, "its process has ended", grace_s=0.0)
    watchdog.step(0.0)
    assert is_ended.is_set() and threading.active_count() < 50


# ---- which process is stuck ----------------------------------------------------------------------


def waiting(rank: int, activity: str = "step 8, training step", idle_s: float = 1001.0):
    return PeerState(rank, "a", activity, None, idle_s, "training step" in activity)


def test_the_stuck_process_is_named_and_not_one_that_waits_for_it():
    waits = [waiting(rank) for rank in range(3)]
    saves = waiting(3, "step 8, saving", 1001.0)
    named = stuck_loss([*waits, saves], STUCK_S, 2 * INTERVAL_S)
    assert named is not None and named.peer is saves and "ranks 0-2: step 8, tr" in str(named)
    oldest = stuck_loss([*waits, waiting(3, idle_s=1050.0)], STUCK_S, 2 * INTERVAL_S)
    assert oldest is not None and oldest.peer is not None and oldest.peer.rank == 3
    unknown = stuck_loss(waits, STUCK_S, 2 * INTERVAL_S)
    assert unknown is not None and unknown.peer is None
    assert "not known: ranks 0-2: step 8, training step, 1001 s" in str(unknown)
    assert Loss.of(unknown.message()) == unknown
    assert stuck_loss([waiting(0, idle_s=999.0), saves], STUCK_S, 2 * INTERVAL_S) is None


def test_a_process_that_waits_lets_rank_0_decide(watchdog, clock, ended):
    watchdog._heartbeat.parent, parent = linked()
    parent.send({"kind": "beat", "states": [asdict(OTHER)]})
    with doing("training step", step=8, is_timed=True):
        while clock[0] < STUCK_S + 2 * INTERVAL_S:
            watchdog._heartbeat.monitor.heard([OTHER])
            run(watchdog, clock, INTERVAL_S)
        assert watchdog._heartbeat.monitor.loss is None
        run(watchdog, clock, 2 * INTERVAL_S)
    assert watchdog._heartbeat.monitor.loss is not None, "rank 0 has not answered"


@pytest.mark.parametrize("timeout_s", [60.0, 120.0, 1800.0])
def test_being_stuck_is_reported_before_the_collectives_give_up(timeout_s):
    assert timeout_s / 2 <= stuck_after_s(timeout_s, INTERVAL_S) <= timeout_s - 18.0


@pytest.mark.parametrize("is_timed", [False, True])
def test_long_work_is_not_stuck(watchdog, clock, ended, is_timed):
    """Hours of exporting, compiling or reading; a step of many micro-batches."""
    with doing("work", is_timed=is_timed):
        for _ in range(200):
            watchdog._heartbeat.monitor.heard([OTHER])
            run(watchdog, clock, INTERVAL_S * 7)
            if is_timed:
                progressed()
    assert ended == []


def test_the_own_error_of_a_process_has_time_after_the_end_of_another(watchdog, clock, ended):
    """A rank that fails is usually first noticed by the collective of the others."""
    watchdog._heartbeat.monitor.ended(1, "it ended with ValueError")
    run(watchdog, clock, 9.0)
    assert ended == []
    run(watchdog, clock, 2.0)
    assert ended[0] == EXIT_PEER_LOST


def test_an_error_of_a_collective_is_noted_with_the_lost_process(watchdog):
    watchdog._heartbeat.monitor.ended(1, "its process has ended")
    watchdog.step(0.0)
    watchdog._thread = threading.Thread(target=lambda: None)
    watchdog._thread.start()
    error = RuntimeError("Connection closed by peer")
    watchdog.stop(error)
    (note,) = error.__notes__
    assert note.startswith("heartbeats: rank 1 (host node-b, pipeline stage 2 of 2) is lost")


def test_activities_nest_and_keep_the_step(monkeypatch) -> None:
    before = current_activity()
    monkeypatch.setattr(activity, "_current", before)  # restored after the test
    with doing("training step", step=3, is_timed=True):
        with doing("writing the logs"):
            assert str(current_activity()) == "step 3, writing the logs"
            assert not current_activity().is_timed
        assert str(current_activity()) == "step 3, training step" and current_activity().is_timed
    with pytest.raises(ConfigError), doing("exporting"):
        raise ConfigError("broken")
    assert current_activity() == before
    with pytest.raises(RuntimeError), doing("exporting"):
        raise RuntimeError("Connection closed by peer")
    assert str(current_activity()) == "exporting", "for the report of this process"


# ---- over processes -----------------------------------------------------------------------------


def join(timeouts: dict[str, int]) -> dict[str, Any]:
    """Join a world as under torchrun, with a layout; timeouts of all groups, and the threads."""
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_idpo.checkpoint.background_save import BackgroundWorker
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.config.load import load_config
    from megatron_idpo.mcore.parallel.groups import ModelGroups, start_layout, stop_layout
    from megatron_idpo.mcore.parallel.pipeline import stage_group
    from megatron_idpo.mcore.parallel.world import distributed_world

    overrides = [f"training.{name}={value}" for name, value in timeouts.items()]
    config = load_config(
        Path(os.devnull), ["training.output=x", *overrides], required=("training",)
    )
    found: dict[str, Any] = {}

    def timeout_s(group: Any) -> float:
        return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())

    with distributed_world(config):
        start_layout(Layout(pipeline=2))
        groups = ModelGroups.of()
        stage = stage_group(groups, is_member=True, needs_group=True)
        assert stage is not None
        named = {
            "world": dist.group.WORLD,
            "pipeline": groups.pipeline,
            "data": groups.data_and_context,
            "embedding": parallel_state.get_embedding_group(),
            "stages": stage.group,
            "saver": BackgroundWorker().group,
        }
        found = {name: timeout_s(group) for name, group in named.items()}
        found["threads"] = [thread.name for thread in threading.enumerate()].count("heartbeat")
        found["stage"] = activity.current_stage()
        stop_layout()
    found["threads after"] = [thread.name for thread in threading.enumerate()].count("heartbeat")
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("heartbeat_timeout_s", [40, 0])
def test_the_timeout_reaches_every_process_group(workers, heartbeat_timeout_s):
    timeouts = {"timeout_s": 123, "heartbeat_timeout_s": heartbeat_timeout_s}
    for rank, found in enumerate(workers.run_as_program(join, 2, timeouts)):
        assert found.pop("stage") == (rank, 2)
        assert (found.pop("threads"), found.pop("threads after")) == (heartbeat_timeout_s // 40, 0)
        assert set(found.values()) == {123.0}, found


def stop_on_rank(stopped: int, directory: str) -> None:
    """A rank stops (SIGSTOP) while the other one waits for it in a collective."""
    import torch.distributed as dist

    from megatron_idpo.mcore.watchdog.watch import watching

    os.dup2(os.open(f"{directory}/{dist.get_rank()}", os.O_CREAT | os.O_WRONLY), 2)
    with watching(1000.0, REAL_TIMEOUT_S), doing("training step", step=5, is_timed=True):
        dist.barrier()
        if dist.get_rank() == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


REAL_TIMEOUT_S = 4.0
"""More than a worker waits for a core between two heartbeats."""


@pytest.mark.distributed
def test_a_stopped_process_ends_the_others_with_the_exit_code(workers, tmp_path):
    with pytest.raises(WorkerError) as died:
        workers.run(stop_on_rank, 3, 2, str(tmp_path), timeout_s=60.0)
    assert all(f"rank {rank} of 3 died (exit code 3)" in str(died.value) for rank in (0, 1))
    for rank in (0, 1):
        message = (tmp_path / str(rank)).read_text()
        assert message.startswith(f"megatron-idpo: error (rank {rank}): rank 2 (host ")
        assert "is lost: no heartbeat for " in message and "step 5, training step" in message
        assert "(barrier, distributed_c10d.py:" in message
