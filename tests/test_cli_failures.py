"""A failure is told once, by the first rank to fail, and ends with the code of its kind."""

import socket
from datetime import timedelta

import pytest

from megatron_idpo.cli.errors import (
    EXIT_INTERRUPTED,
    is_lost_peer,
    report_interrupted,
    report_lost_peer,
    report_user_error,
    stopped_an_import_of_megatron,
)
from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, ConfigError

LOST = "[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4242\nmore"


@pytest.fixture
def alone(monkeypatch):
    """No other rank."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def one_of_two(monkeypatch):
    """Rank 1 of 2, whose store cannot be reached."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_users_mistake(alone, capsys):
    assert (
        report_user_error(ConfigError.at("data.train", "is missing", "add it")) == EXIT_USER_ERROR
    )
    assert capsys.readouterr().err == "megatron-idpo: error: data.train: is missing; add it\n"


def test_ctrl_c(alone, capsys):
    assert report_interrupted() == EXIT_INTERRUPTED == 130
    assert "interrupted; what was saved before is complete" in capsys.readouterr().err


def test_a_lost_peer_is_told_by_the_first_line(one_of_two, capsys):
    assert report_lost_peer(RuntimeError(LOST)) == EXIT_PEER_LOST
    message = capsys.readouterr().err
    assert message.startswith(
        "megatron-idpo: error (rank 1): another process of this run has ended"
    )
    assert "Connection closed by peer" in message and "more" not in message and "saved" in message


@pytest.mark.parametrize(
    "message",
    [
        LOST,
        "Gloo connectFullMesh failed: Connection reset by peer",
        "NCCL communicator was aborted on rank 0",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exited",
        "broken pipe",
    ],
)
def test_what_gloo_and_nccl_say_of_a_dead_process(one_of_two, message):
    assert is_lost_peer(RuntimeError(message))
    assert not is_lost_peer(ValueError(message))


def test_other_errors_are_no_lost_peer(one_of_two):
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_process_alone_has_no_peer_to_lose(alone, monkeypatch):
    assert not is_lost_peer(RuntimeError(LOST))
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over, without a rank
    assert not is_lost_peer(RuntimeError(LOST))


def test_who_cannot_reach_the_others_speaks(one_of_two, capsys):
    assert report_user_error(ConfigError("here")) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "megatron-idpo: error (rank 1): here\n"


def test_of_several_ranks_that_fail_the_first_one_speaks(monkeypatch, capsys):
    """And in another attempt of torchrun, the first of that one."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    said = []
    for attempt, rank in [("0", "1"), ("0", "0"), ("1", "0")]:
        world = {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RESTART_COUNT": attempt,
        }
        for name, value in world.items():
            monkeypatch.setenv(name, value)
        assert report_user_error(ConfigError(f"of rank {rank}")) == EXIT_USER_ERROR
        said.append(capsys.readouterr().err)
    assert "error (rank 1): of rank 1" in said[0]
    assert said[1] == ""
    assert "error (rank 0): of rank 0" in said[2]


def test_an_import_of_megatron_that_broke(tmp_path, monkeypatch):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    code = compile("open('/no/such/file')", str(package / "broken.py"), "exec")
    with pytest.raises(FileNotFoundError) as raised:
        exec(code, {})
    assert stopped_an_import_of_megatron(raised.value)
    called = compile("def f():\n open('/no/such/file')", str(package / "fine.py"), "exec")
    names: dict = {}
    exec(called, names)
    with pytest.raises(FileNotFoundError) as raised:
        names["f"]()
    assert not stopped_an_import_of_megatron(raised.value)
    with pytest.raises(FileNotFoundError) as raised:
        exec(compile("open('/no/such/file')", "elsewhere.py", "exec"), {})
    assert not stopped_an_import_of_megatron(raised.value)
