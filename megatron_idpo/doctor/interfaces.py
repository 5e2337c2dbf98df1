"""Which network interfaces gloo and NCCL use, from their environment variables or their rules."""

import socket
from collections.abc import Mapping

import psutil

from megatron_idpo.doctor.finding import Finding, State

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_NAME = "network interfaces"
_SKIPPED_BY_NCCL = ("lo", "docker")


def addresses() -> dict[str, str]:
    """The IPv4 address of each interface that is up, by its name."""
    up = psutil.net_if_stats()
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in up and up[name].isup
    }


def check_interfaces(environment: Mapping[str, str]) -> Finding | None:
    """A finding if a variable names an interface that this machine does not have."""
    here = addresses()
    for variable in VARIABLES:
        value = environment.get(variable, "")
        if value and not value.startswith("^") and not _selected(value, here):
            message = f"{variable} is {value}, but {socket.gethostname()} has {_listed(here)}"
            remedy = "name an interface that reaches the other machines, on each by its own name"
            return Finding(_NAME, State.BROKEN, message, "", remedy)
    return None


def chosen_interfaces(environment: Mapping[str, str]) -> str:
    """What gloo and NCCL use on this machine and why, in a line.

    gloo binds to the address of the host's name. NCCL takes InfiniBand's interfaces (`ib…`), then
    any but the loopback and Docker's; both from their documentation.
    """
    here = addresses()
    gloo = _selected(environment.get(VARIABLES[0], ""), here)
    reason = f"by {VARIABLES[0]}"
    if not gloo:
        host, reason = _host_address(), "the address of the host's name"
        gloo = {name: address for name, address in here.items() if address == host}
    nccl = _selected(environment.get(VARIABLES[1], ""), here)
    nccl_reason = f"by {VARIABLES[1]}"
    if not nccl:
        usable = {n: a for n, a in here.items() if not n.startswith(_SKIPPED_BY_NCCL)}
        nccl = {n: a for n, a in usable.items() if n.startswith("ib")} or usable or here
        nccl_reason = "its own choice"
    return f"gloo {_listed(gloo)} ({reason}), NCCL {_listed(nccl)} ({nccl_reason})"


def _selected(value: str, here: Mapping[str, str]) -> dict[str, str]:
    """The interfaces that a variable names: by prefix, after `=` by name, after `^` all others."""
    names = [name for name in value.lstrip("^=").split(",") if name]
    if not names:
        return {}
    is_whole, is_excluded = value.startswith("="), value.startswith("^")
    return {
        name: address
        for name, address in here.items()
        if any(name == one if is_whole else name.startswith(one) for one in names) != is_excluded
    }


def _host_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _listed(interfaces: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in interfaces.items()) or "none"
