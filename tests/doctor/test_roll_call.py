"""`doctor --nodes --nnodes N`: machines that come and machines that do not."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_idpo.doctor import interfaces, roll_call
from megatron_idpo.doctor.finding import State
from megatron_idpo.doctor.roll_call import Meeting, meet


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meetings(port: int, ranks: tuple[int, ...], *, nnodes: int, wait_s: float) -> list[tuple]:
    """What each machine finds out; every machine is a thread."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(
            pool.map(
                lambda rank: meet(Meeting(nnodes, rank, "127.0.0.1", port, wait_s=wait_s)), ranks
            )
        )


def test_all_machines_come(port):
    findings = meetings(port, (0, 1, 2), nnodes=3, wait_s=60.0)
    assert {finding.state for finding, _ in findings} == {State.OK}
    assert findings[0][0].value.startswith("all 3 have come: 0 (")
    assert len({port for _, port in findings}) == 1


def test_machines_that_do_not_come_are_named_on_the_others(port):
    for finding, _ in meetings(port, (0, 2), nnodes=4, wait_s=1.0):
        assert finding.state is State.BROKEN
        assert "--node-rank 1, 3 of 4 did not come within 1 s; here: 0 (" in finding.value
        assert f"at port {port}" in finding.remedy


def test_first_machine_that_does_not_come_is_named(port, monkeypatch):
    monkeypatch.setattr(roll_call, "_ANSWER_S", 0.0)
    ((finding, _),) = meetings(port, (1,), nnodes=2, wait_s=1.0)
    assert finding.state is State.BROKEN
    assert f"the first machine, 127.0.0.1:{port}, cannot be reached" in finding.value


def test_two_machines_with_one_rank_are_reported(port):
    # A third machine is missing, so that the first one is still there when the last one comes.
    findings = [finding for finding, _ in meetings(port, (0, 1, 1), nnodes=3, wait_s=2.0)]
    assert "--node-rank 2 of 3 did not come" in findings[0].value
    assert any("another process has come as --node-rank 1" in one.value for one in findings)


# --- interfaces -------------------------------------------------------------------------------

HERE = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1", "docker0": "172.17.0.1"}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(interfaces, "addresses", lambda: HERE)
    monkeypatch.setattr(interfaces, "_host_address", lambda: "10.0.0.1")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "gloo eth0 10.0.0.1 (the address of the host's name), NCCL ib0 10.1.0.1 (its own"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "gloo ib0 10.1.0.1 (by GLOO_SOCKET_IFNAME), NCCL ib0"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "NCCL eth0 10.0.0.1 (by NCCL_SOCKET_IFNAME)"),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, "NCCL eth0 10.0.0.1 (by NCCL_SOCKET_IFNAME)"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker,ib"}, "NCCL eth0 10.0.0.1 (by NCCL_SOCKET_IFNAME)"),
    ],
)
def test_chosen_interfaces_are_explained(here, environment, line):
    assert line in interfaces.chosen_interfaces(environment)
    assert interfaces.check_interfaces(environment) is None


def test_interface_that_does_not_exist_is_reported(here):
    finding = interfaces.check_interfaces({"NCCL_SOCKET_IFNAME": "=eth"})
    assert finding is not None and finding.state is State.BROKEN
    assert "NCCL_SOCKET_IFNAME is =eth, but" in finding.value and "eth0 10.0.0.1" in finding.value


@pytest.mark.exhaustive  # imports torch in four processes
def test_two_machines_by_the_command_line(port, tmp_path):
    (tmp_path / "run.yaml").write_text(f"training: {{output: {tmp_path}/runs/x}}\n")
    address = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    command = [sys.executable, "-m", "megatron_idpo", "doctor", "--nodes", "--nnodes", "2"]
    machines = [
        subprocess.Popen(
            [*command, "--node-rank", rank, "--nproc-per-node", "1", *address],
            env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for machine in machines:
        output, _ = machine.communicate(timeout=180)
        assert "all 2 have come" in output and "2 processes on 1 machines" in output
        assert "GB/s" in output and "NCCL" in output
