"""Reports of failures, and their exit codes."""

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, HashStore

from megatron_idpo.cli.errors import (
    EXIT_INTERRUPTED,
    is_lost_peer,
    is_megatron_import_error,
    report_interrupted,
    report_lost_peer,
    report_user_error,
)
from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, LOST_PEER_NOTE, ConfigError

LOST = "[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4242\nmore"


@pytest.fixture
def alone(monkeypatch):
    """No other rank."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rank_1_of_2(monkeypatch):
    """Rank 1 of 2, with a store that cannot be reached."""

    def unreachable(*args, **kwargs):
        raise DistNetworkError("The client socket has timed out")

    monkeypatch.setattr("torch.distributed.TCPStore", unreachable)
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_user_error(alone, capsys):
    assert (
        report_user_error(ConfigError.at("data.train", "is missing", "add it")) == EXIT_USER_ERROR
    )
    assert capsys.readouterr().err == "megatron-idpo: error: data.train: is missing; add it\n"


def test_ctrl_c(alone, capsys):
    assert report_interrupted() == EXIT_INTERRUPTED == 130
    assert "interrupted; everything saved so far is complete" in capsys.readouterr().err


def test_a_lost_peer_is_reported_with_the_first_line_of_the_error(rank_1_of_2, capsys):
    assert report_lost_peer(RuntimeError(LOST)) == EXIT_PEER_LOST
    message = capsys.readouterr().err
    assert message.startswith("megatron-idpo: error (rank 1): another process of this run has died")
    assert "Connection closed by peer" in message and "more" not in message and "saved" in message


def test_a_lost_peer_is_named_by_the_watchdogs_note(rank_1_of_2, capsys):
    error = RuntimeError(LOST)
    error.add_note(f"{LOST_PEER_NOTE}rank 3 (host b) is lost: its process has ended")
    report_lost_peer(error)
    assert "rank 3 (host b) is lost: its process has ended; Runtime" in capsys.readouterr().err


def test_a_timeout_is_not_reported_as_a_death(rank_1_of_2, capsys):
    error = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 9000ms for recv operation")
    assert is_lost_peer(error) and report_lost_peer(error) == EXIT_PEER_LOST
    message = capsys.readouterr().err
    assert "has not answered within training.timeout_s" in message and "has died" not in message


@pytest.mark.parametrize(
    "message",
    [
        LOST,
        "Gloo connectFullMesh failed: Connection reset by peer",
        "NCCL communicator was aborted on rank 0",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exited",
        "broken pipe",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error: No route to host",
    ],
)
def test_errors_of_gloo_and_nccl_about_a_dead_process(rank_1_of_2, message):
    assert is_lost_peer(RuntimeError(message))
    assert not is_lost_peer(ValueError(message))


def test_other_errors_are_not_a_lost_peer(rank_1_of_2):
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(DistBackendError("NCCL error: unhandled system error"))


@pytest.mark.parametrize("kind", [DistNetworkError, DistStoreError])
def test_a_store_that_has_ended_is_a_lost_peer(rank_1_of_2, kind):
    assert is_lost_peer(kind("Failed to recv, got 0 bytes. Connection was likely closed"))


def test_an_error_of_nccl_is_a_lost_peer_if_the_watchdog_knows_of_one(rank_1_of_2):
    """But a bug of this rank keeps its traceback: others may have ended with the same one."""
    backend, bug = DistBackendError("NCCL error: unhandled system error"), RuntimeError("a bug")
    for error in (backend, bug):
        error.add_note(f"{LOST_PEER_NOTE}rank 3 (host b) is lost: its process has ended")
    assert is_lost_peer(backend) and not is_lost_peer(bug)


def test_each_machine_reports_a_lost_peer_once_and_the_peer_its_own_error(
    rank_1_of_2, monkeypatch, capsys
):
    """The peer fails alone and its sockets close: the others are faster."""
    store = HashStore()
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: store)
    for machine, rank in ((0, 0), (0, 1), (1, 2)):
        monkeypatch.setenv("GROUP_RANK", str(machine))
        monkeypatch.setenv("RANK", str(rank))
        report_lost_peer(RuntimeError(LOST))
    for rank in (3, 4):
        monkeypatch.setenv("RANK", str(rank))
        report_user_error(ConfigError.at("training.output", "the disk is full"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"error (rank {rank})" for rank in (0, 2, 3)]


def test_a_single_process_has_no_peer(alone, monkeypatch):
    assert not is_lost_peer(RuntimeError(LOST))
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over, without a rank
    assert not is_lost_peer(RuntimeError(LOST))


def test_a_rank_without_a_store_prints(rank_1_of_2, capsys):
    assert report_user_error(ConfigError("here")) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "megatron-idpo: error (rank 1): here\n"


def test_a_failing_import_of_megatron_is_recognized(tmp_path, monkeypatch):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    code = compile("open('/no/such/file')", str(package / "broken.py"), "exec")
    with pytest.raises(FileNotFoundError) as raised:
        exec(code, {})
    assert is_megatron_import_error(raised.value)
    called = compile("def f():\n open('/no/such/file')", str(package / "fine.py"), "exec")
    names: dict = {}
    exec(called, names)
    with pytest.raises(FileNotFoundError) as raised:
        names["f"]()
    assert not is_megatron_import_error(raised.value)
    with pytest.raises(FileNotFoundError) as raised:
        exec(compile("open('/no/such/file')", "elsewhere.py", "exec"), {})
    assert not is_megatron_import_error(raised.value)
