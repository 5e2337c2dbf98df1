"""torchrun's agent with our rules: what it restarts, which machines it waits for, what it notes."""

import signal
import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from megatron_idpo.cli import agent, rendezvous
from megatron_idpo.cli.rendezvous import LauncherNotes, PatientRendezvous, announce_launch
from megatron_idpo.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from megatron_idpo.mcore.watchdog.launch_notes import (
    VARIABLE,
    Launch,
    LaunchEnd,
    NeighborWatch,
    set_usable,
    usable,
)


@pytest.mark.parametrize(
    ("codes", "stopped", "restarts"),
    [
        ([1], False, 2),
        ([3, -signal.SIGKILL], False, 2),  # another machine is lost
        ([75], False, 0),  # stopped, on another machine
        ([-signal.SIGTERM], True, 0),
        ([2, 3], False, 0),  # would fail again
        ([], False, 2),  # running
    ],
)
def test_workers_are_restarted_only_if_that_can_help(monkeypatch, codes, stopped, restarts) -> None:
    result = SimpleNamespace(failures=failures_with(codes))
    machine = agent_with(result, monkeypatch, stopped=stopped)
    assert machine._monitor_workers(group_of(3, waiting=[1])) is result
    assert machine._remaining_restarts == restarts


def failures_with(codes: Sequence[int]) -> dict[int, Any]:
    """Failures of ranks with these exit codes; a rank is its process id, too."""
    return {rank: SimpleNamespace(pid=rank, exitcode=code) for rank, code in enumerate(codes)}


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([3, 3, -signal.SIGKILL], 3),  # stopped, and killed by torchrun
        ([-signal.SIGKILL, 3, 3], 137),  # killed first: out of memory
        ([2, -signal.SIGTERM, 3], 2),
        ([75, -signal.SIGTERM, 75], 75),  # one worker received a signal; another was slower
        ([75, -signal.SIGSEGV, 75], 139),  # crashed while torchrun waited for it
    ],
)
def test_workers_that_torchrun_ended_do_not_decide_the_exit_code(monkeypatch, codes, code) -> None:
    """The first worker has failed; torchrun then ended the others."""
    result = RunResult(state=WorkerState.FAILED, failures=failures_with(codes))
    machine = agent_with(result, monkeypatch, stopped=False)
    machine._ended.update(range(1, len(codes)))
    failures = machine._monitor_workers(group_of(3, waiting=[])).failures.values()
    assert agent.exit_code([failure.exitcode for failure in failures], stopped=False) == code


@pytest.mark.parametrize(("first", "seconds"), [(3, 10), (1, 30), (-signal.SIGKILL, 30)])
def test_torchrun_waits_shorter_for_workers_of_which_one_is_lost(first, seconds) -> None:
    """A stopped worker would use up all of its time."""
    closed = []
    processes = [
        SimpleNamespace(pid=pid, returncode=code, poll=lambda code=code: code)
        for pid, code in [(70, first), (71, None), (72, None)]
    ]
    workers: Any = SimpleNamespace(
        close=lambda *arguments: closed.append(arguments),
        subprocess_handlers={
            rank: SimpleNamespace(proc=process) for rank, process in enumerate(processes)
        },
    )
    reported = []
    ended = agent.end_sooner(workers, reported.append)
    assert ended == set()
    workers.close()
    assert ended == {71, 72}
    assert closed == [(None, seconds)]
    assert reported == [{0: first}]


def agent_with(result: Any, monkeypatch: Any, *, stopped: bool) -> Any:
    """An agent whose workers have this result, and that may restart them twice."""
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda *_: result)
    kind: Any = agent.agent_type(lambda: stopped)
    created = kind.__new__(kind)
    created._remaining_restarts = 2
    created._ended = set()
    return created


def group_of(machines: int, waiting: Sequence[int | Exception]) -> Any:
    """A run on some of at most 3 machines, and how many wait to join, asked again and again."""
    answers = iter(waiting)

    def num_nodes_waiting() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    handler = PatientRendezvous(
        SimpleNamespace(settings=SimpleNamespace(max_nodes=3), num_nodes_waiting=num_nodes_waiting)
    )
    return SimpleNamespace(spec=SimpleNamespace(rdzv_handler=handler), group_world_size=machines)


@pytest.mark.parametrize(
    ("waiting", "restarts"),
    [
        ([0, 0, 1], True),  # the news is late
        ([0, 0, 0, 0], False),  # stopped, on another machine
        ([0, RendezvousConnectionError("its host has ended")], False),
    ],
)
def test_workers_that_were_stopped_for_a_new_machine_are_restarted(
    monkeypatch, waiting, restarts
) -> None:
    """Its agent has not noticed the machine yet, for which another agent stops all workers."""
    clock = iter(range(10))
    monkeypatch.setattr(agent.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(agent.time, "sleep", lambda _: None)
    result = RunResult(state=WorkerState.FAILED, failures=failures_with([EXIT_PREEMPTED]))
    machine = agent_with(result, monkeypatch, stopped=False)
    state = machine._monitor_workers(group_of(2, waiting)).state
    assert state == (WorkerState.HEALTHY if restarts else WorkerState.FAILED)
    assert machine._remaining_restarts == (2 if restarts else 0)


@pytest.mark.parametrize(
    ("machine", "waiting", "asked", "notices"),
    [
        (0, [0, 1, 1, 2, 3], [0, 0, 0, 2, 3], 1),  # 4 machines at most: 3 that wait are 2
        (1, [1], [0], 0),
    ],
)
def test_a_machine_that_does_not_fit_is_left_waiting(
    machine, waiting, asked, notices, capfd
) -> None:
    answers = iter(waiting)
    rendezvous = PatientRendezvous(
        SimpleNamespace(
            settings=SimpleNamespace(max_nodes=4), num_nodes_waiting=lambda: next(answers)
        )
    )
    notes = HashStore()
    set_usable(notes, [2, 4])
    rendezvous.started(machine, 2, notes)
    assert [rendezvous.num_nodes_waiting() for _ in waiting] == asked
    printed = capfd.readouterr().err
    assert printed.count("3 machines do not fit the run (2, 4 do)") == notices


def test_a_machine_is_used_while_the_workers_have_not_said_what_fits() -> None:
    rendezvous = PatientRendezvous(
        SimpleNamespace(settings=SimpleNamespace(max_nodes=4), num_nodes_waiting=lambda: 1)
    )
    rendezvous.started(0, 2, HashStore())
    assert rendezvous.num_nodes_waiting() == 1


@pytest.mark.parametrize("is_static", [True, False])
def test_workers_know_the_store_of_their_launchers(is_static, monkeypatch) -> None:
    """The same one in all launchers; notes of an earlier start are out of sight."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(machine: int, restarts: int, prefix: str) -> Launch:
        handler = SimpleNamespace(get_backend=lambda: "static" if is_static else "c10d")
        if not is_static:
            handler.settings = SimpleNamespace(min_nodes=1, max_nodes=3)
        group = SimpleNamespace(
            spec=SimpleNamespace(rdzv_handler=handler),
            store=PrefixStore(prefix, TCPStore("127.0.0.1", server.port, wait_for_workers=False)),
            group_world_size=2,
            group_rank=machine,
            workers=[SimpleNamespace(global_rank=machine)],
        )
        monkeypatch.delenv(VARIABLE, raising=False)
        announce_launch(group, restarts)
        launch = Launch.from_environment()
        assert launch is not None
        return launch

    first, second = start(0, 0, "1"), start(1, 0 if is_static else 1, "1")
    assert first == second
    assert (first.fewest, first.most) == ((2, 2) if is_static else (1, 3))
    set_usable(first.connect(10.0), [1])
    assert usable(second.connect(10.0)) == [1]
    later = start(0, 1, "1" if is_static else "2")
    assert usable(later.connect(10.0)) is None


@pytest.mark.parametrize(
    ("codes", "stopped", "reason", "code"),
    [
        ({0: -signal.SIGKILL}, False, "rank 4 (host h) has ended with exit code -9", 3),
        ({0: 3, 1: 1}, False, "rank 5 (host h) has ended with exit code 1", 3),
        ({1: EXIT_USER_ERROR}, False, "rank 5 (host h) has ended with exit code 2", 3),
        ({0: -signal.SIGTERM}, True, "rank 4 (host h) was stopped by a signal", EXIT_PREEMPTED),
    ],
)
def test_workers_that_ended_are_reported_to_those_of_other_machines(
    codes, stopped, reason, code, monkeypatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "h")
    monkeypatch.setattr(rendezvous, "_REPORT_S", 60.0)  # on a busy machine
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch("127.0.0.1", store.port, "start", fewest=2, most=2)
    workers = [SimpleNamespace(global_rank=rank) for rank in (4, 5)]
    group: Any = SimpleNamespace(group_rank=2, workers=workers)
    machine = agent_with(None, monkeypatch, stopped=stopped)
    machine._notes = LauncherNotes(launch, group)
    machine._report(codes)
    watch = NeighborWatch(launch.notes_in(store), 2, 60.0)
    assert watch.look(0.0) == LaunchEnd(reason, code)
    assert store.get("megatron_idpo/launch/start/beat/2") == b"0 ranks 4-5 (host h)"
