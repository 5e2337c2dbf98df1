"""Connections between neighbors in the tree of processes: JSON messages, one per line, over TCP.

Nothing here blocks after the connection is made: a message to a process that does not read is kept
up to a limit and then dropped, because the next heartbeat replaces it.

The first line of a connection is the token of the run, and not JSON: nothing that a stranger
sends is decoded.
"""

import hmac
import ipaddress
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil

_MAX_UNSENT_BYTES = 1 << 20
_MAX_MESSAGE_BYTES = 1 << 20
"""A machine's heartbeat has about 100 bytes per process; longer is not one of ours."""

_MAX_STRANGER_BYTES = 4096
"""A token has 32."""

_CONNECT_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 16

type Message = dict[str, Any]


class Link(Protocol):
    """A connection to a neighbor."""

    is_closed: bool
    """Whether the neighbor has closed it; what arrived before can still be received."""

    def send(self, message: Message) -> None:
        """Send without waiting; dropped if the neighbor does not read."""

    def receive(self) -> list[Message]:
        """The messages that have arrived, without waiting."""

    def close(self) -> None:
        """Close it; what was sent still arrives."""


class SocketLink:
    """A `Link` over a connected socket."""

    def __init__(self, connection: socket.socket, expected_token: str = "") -> None:
        """Takes over the socket.

        Args:
            connection: to the neighbor.
            expected_token: the first line that the neighbor must send; empty: none.
        """
        connection.setblocking(False)
        self.socket = connection
        self.is_closed = False
        self._expected_token = expected_token
        self._received = b""
        self._unsent = b""

    def send(self, message: Message) -> None:
        """See `Link`."""
        if len(self._unsent) < _MAX_UNSENT_BYTES:
            self._unsent += json.dumps(message).encode() + b"\n"
        while self._unsent and not self.is_closed:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:  # also received from, where a message of the end may be waiting
                return

    def receive(self) -> list[Message]:
        """See `Link`."""
        while not self.is_closed:
            try:
                size_bytes = _MAX_STRANGER_BYTES if self._expected_token else _CHUNK_BYTES
                chunk = self.socket.recv(size_bytes)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self._received += chunk
            self.is_closed = not chunk or len(self._received) > _MAX_MESSAGE_BYTES
            self._check_token()
        if self._expected_token:
            return []
        *lines, self._received = self._received.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # the latter if it is deeply nested
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.is_closed = True  # not one of our processes
            return []
        return messages

    def close(self) -> None:
        """See `Link`."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            # Closing with unread data resets the connection, and what was sent may be lost.
            for _ in range(_MAX_MESSAGE_BYTES // _CHUNK_BYTES):
                if not self.socket.recv(_CHUNK_BYTES):
                    break
        self.socket.close()

    def _check_token(self) -> None:
        """Compare the first line, once it has arrived; close the connection of a stranger."""
        if not self._expected_token:
            return
        line, end, rest = self._received.partition(b"\n")
        if end and hmac.compare_digest(line, self._expected_token.encode()):
            self._expected_token, self._received = "", rest
        elif end or len(self._received) >= _MAX_STRANGER_BYTES:
            self.is_closed = True


def listen(num_children: int, *, is_local: bool) -> socket.socket:
    """A socket on a free port for this number of children; it does not block.

    Args:
        num_children: that will connect, at once.
        is_local: whether all of them run on this machine; others then cannot connect.
    """
    if is_local:
        server = socket.create_server(("127.0.0.1", 0), backlog=num_children)
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=num_children
        )
    else:
        server = socket.create_server(("", 0), backlog=num_children)
    server.setblocking(False)
    return server


def connect(addresses: Sequence[str], port: int, token: str) -> SocketLink | None:
    """Connect to the first address that answers, and send the token; None if none does."""
    for address in addresses:
        with suppress(OSError):
            connection = socket.create_connection((address, port), _CONNECT_TIMEOUT_S)
            connection.sendall(f"{token}\n".encode())
            return SocketLink(connection)
    return None


def not_own(addresses: Sequence[str]) -> list[str]:
    """Those of another machine that this one does not have: there it would connect to itself.

    Loopback, often the address of a machine's own host name; bridges, which every machine numbers
    alike.
    """
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return [
        address
        for address in addresses
        if address not in own and not ipaddress.ip_address(address).is_loopback
    ]


def own_addresses() -> list[str]:
    """Addresses under which other machines may reach this one, the likeliest first.

    The one of the interface that gloo or NCCL is set to use; the one of the route to the first
    machine; those of the host name; those of all interfaces that are up.
    """
    addresses: list[str] = []
    interfaces = psutil.net_if_addrs()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for name in os.environ.get(variable, "").split(","):
            found = interfaces.get(name.strip().lstrip("="), ())
            addresses += [entry.address for entry in found if entry.family == socket.AF_INET]
    master, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "1"))
    with suppress(OSError):
        for family, kind, _, _, target in socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # chooses a route; nothing is sent
                addresses.append(probe.getsockname()[0])
    with suppress(OSError):
        addresses += socket.gethostbyname_ex(socket.gethostname())[2]
    for name, status in psutil.net_if_stats().items():
        found = interfaces.get(name, ()) if status.isup else ()
        addresses += [entry.address for entry in found if entry.family == socket.AF_INET]
    return list(dict.fromkeys(addresses))
