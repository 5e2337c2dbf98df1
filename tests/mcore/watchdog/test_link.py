"""Connections of heartbeats: messages, strangers, and the addresses of a machine."""

import json
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_idpo.mcore.watchdog.link import SocketLink, connect, listen, not_own, own_addresses


def linked() -> tuple[SocketLink, SocketLink]:
    first, second = socket.socketpair()
    return SocketLink(first), SocketLink(second)


def test_messages_arrive_whole_and_in_order() -> None:
    first, second = linked()
    for index in range(3):
        first.send({"kind": "beat", "index": index, "text": "x" * 5000})
    first.close()
    assert [message["index"] for message in second.receive()] == [0, 1, 2]
    assert second.is_closed
    second.close()


def test_a_neighbor_that_does_not_read_blocks_nothing() -> None:
    first, second = linked()
    for index in range(3000):
        first.send({"index": index, "text": "x" * 1000})
    received: list[Any] = []
    for _ in range(100):
        received += second.receive()
        first.send({"index": "last"})
    assert [message["index"] for message in received[:50]] == list(range(50))
    assert len(received) < 3000 and received[-1]["index"] == "last" and not first.is_closed
    for link in (first, second):
        link.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"kind": 1\n',
        b"\xff\n",
        pytest.param(b"[" * 5000 + b"\n", id="nested"),
    ],
)
def test_other_protocols_are_disconnected(sent: bytes) -> None:
    stranger, accepted = socket.socketpair()
    link = SocketLink(accepted)
    stranger.sendall(sent)
    assert link.receive() == [] and link.is_closed
    link.close()
    stranger.close()


@pytest.mark.parametrize(
    "sent", [b"wrong\n{}\n", b"token2\n{}\n", b"tok\n", b"x" * 5000, b"[" * 5000 + b"\n"]
)
def test_nothing_is_decoded_before_the_token(sent: bytes, monkeypatch) -> None:
    stranger, accepted = socket.socketpair()
    link = SocketLink(accepted, "token")
    monkeypatch.setattr(json, "loads", None)
    stranger.sendall(sent)
    assert link.receive() == [] and link.is_closed and len(link._received) <= 4096
    link.close()
    stranger.close()


def test_messages_follow_the_token_in_any_pieces() -> None:
    neighbor, accepted = socket.socketpair()
    link = SocketLink(accepted, "token")
    for piece in (b"tok", b'en\n{"kind": "hello"}\n{"ki', b'nd": "beat"}\n'):
        assert not link.is_closed
        neighbor.sendall(piece)
        received = link.receive()
    assert received == [{"kind": "beat"}]
    link.close()
    neighbor.close()


def test_the_first_address_that_answers_is_used() -> None:
    with listen(2, is_local=True) as server:
        port = server.getsockname()[1]
        link = connect(["127.1.2.3", "127.0.0.1"], port, "token")
        assert link is not None and link.socket.getpeername()[0] == "127.0.0.1"
        link.close()
        assert connect(["127.1.2.3"], port, "token") is None, "a local server has one address"


def test_addresses_under_which_a_machine_would_meet_itself_are_left_out(monkeypatch) -> None:
    """The name of this machine is at 127.0.1.1, and each has a bridge for containers."""
    entry = SimpleNamespace(address="172.17.0.1", family=socket.AF_INET)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"docker0": [entry]})
    others = ["127.0.1.1", "172.17.0.1", "::1", "10.0.0.2", "fd00::2"]
    assert not_own(others) == ["10.0.0.2", "fd00::2"]


def test_interfaces_that_are_up_come_last(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.9.9.9")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    addresses = {"ib0": "10.0.0.2", "eth1": "10.1.0.2"}
    entries = {
        name: [SimpleNamespace(address=address, family=socket.AF_INET)]
        for name, address in addresses.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    status = {name: SimpleNamespace(isup=name == "ib0") for name in addresses}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: status)
    assert own_addresses()[-1] == "10.0.0.2" and "10.1.0.2" not in own_addresses()


def test_the_interface_of_gloo_comes_first(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.9.9.9")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_addresses()[0].startswith("127.")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_addresses()[0] == "127.0.0.1"
