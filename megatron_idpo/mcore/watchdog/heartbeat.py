"""The heartbeats of one process: to its parent and its children in the tree of processes.

| message | meaning |
|---|---|
| `hello` | the first from a child, after the run's token (`link.py`): its state |
| `beat` | states of the sender and of the processes below it |
| `bye` | the sender has finished; with a reason: it ends because of an error, perhaps the user's |
| `loss` | a process is lost; passed on to all other neighbors |
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from megatron_idpo.mcore.watchdog.link import Link, Message
from megatron_idpo.mcore.watchdog.monitor import (
    ENDED_GRACE_S,
    USER_ERROR_GRACE_S,
    Loss,
    Monitor,
    PeerState,
)

logger = logging.getLogger(__name__)


@dataclass
class Heartbeat:
    """One process in the tree. Not thread-safe; `watch.py` calls it from one thread."""

    describe: Callable[[], PeerState]
    """The state of this process."""

    monitor: Monitor
    parent: Link | None = None
    parent_state: PeerState | None = None
    """What is known of the parent before its first message. Until then it does not count: an
    address may lead to another program, whose silence or end is no loss."""

    strangers: list[Link] = field(default_factory=list)
    """Accepted, without a `hello` yet."""

    children: dict[int, Link] = field(default_factory=dict)
    """By rank."""

    _has_answer: bool = False
    """Whether the parent has sent a message."""

    _waited_ticks: int = 0
    """For it."""

    def __post_init__(self) -> None:
        """Introduce this process to its parent."""
        if self.parent is not None:
            self.parent.send({"kind": "hello", **self._beat([])})

    def beat(self, now_s: float) -> None:
        """Send heartbeats, and count the silence of neighbors. Call `receive` first."""
        below = self.monitor.below(self.children)
        if self.parent is not None:
            self.parent.send({"kind": "beat", **self._beat(below)})
        for child in self.children.values():
            child.send({"kind": "beat", **self._beat([])})
        self._check_parent()
        had_loss = self.monitor.loss is not None
        self.monitor.tick(now_s)
        if self.monitor.loss is not None and not had_loss:
            self._pass_on(self.monitor.loss, received_from=None)

    def receive(self, links: Sequence[Link] | None = None) -> None:
        """Handle what has arrived on some links, by default on all."""
        for link in self.links() if links is None else links:
            try:
                for message in link.receive():
                    self._handle(link, message)
            except Exception:
                # A message that is not ours costs this connection, not the heartbeats to others.
                logger.exception("a connection for heartbeats is closed: it sent a wrong message")
                self._drop(link)
            else:
                if link.is_closed:
                    self._closed(link)

    def links(self) -> list[Link]:
        """All connections."""
        own = [] if self.parent is None else [self.parent]
        return [*own, *self.strangers, *self.children.values()]

    def lose(self, loss: Loss) -> None:
        """Report a loss that this process has found itself."""
        if self.monitor.reported(loss):
            self._pass_on(loss, received_from=None)

    def states(self) -> list[PeerState]:
        """Of this process and of all that it knows."""
        return [self.describe(), *self.monitor.states()]

    def leave(self, reason: str = "", *, is_user_error: bool = False) -> None:
        """Close all connections. The others treat it as a loss if there is a reason.

        Args:
            reason: the error with which this process ends.
            is_user_error: whether the others raise it too, and need time to clean up.
        """
        bye = {"kind": "bye", "reason": reason, "is_user_error": is_user_error}
        for link in self.links():
            link.send({**bye, "rank": self.describe().rank})
            link.close()
        self.parent, self.children, self.strangers = None, {}, []

    def _beat(self, below: Sequence[PeerState]) -> Message:
        return {"states": [asdict(state) for state in (self.describe(), *below)]}

    def _check_parent(self) -> None:
        """Give up a parent that never answers."""
        if self.parent is None or self._has_answer:
            return
        self._waited_ticks += 1
        if self._waited_ticks * self.monitor.interval_s >= self.monitor.timeout_s:
            self._closed(self.parent)

    def _handle(self, link: Link, message: Message) -> None:
        kind = message.get("kind")
        if link is self.parent and not self._has_answer:
            self._has_answer = True
            if self.parent_state is not None:
                self.monitor.heard([self.parent_state])
        if link in self.strangers:
            if kind != "hello":
                link.is_closed = True
                return
            self.children[message["states"][0]["rank"]] = link
            self.strangers.remove(link)
        if kind in ("hello", "beat"):
            self.monitor.heard([PeerState.of(state) for state in message["states"]])
        elif kind == "bye" and message["reason"]:
            grace_s = USER_ERROR_GRACE_S if message["is_user_error"] else ENDED_GRACE_S
            self._ended(link, message["rank"], f"it ended with {message['reason']}", grace_s)
        elif kind == "bye":
            self.monitor.left(message["rank"])
        elif kind == "loss":
            loss = Loss.of(message["loss"])
            if self.monitor.reported(loss):
                self._pass_on(loss, received_from=link)

    def _closed(self, link: Link) -> None:
        """The neighbor has gone; without a `bye`, its process has died."""
        if link is self.parent and not self._has_answer:
            logger.warning(
                "no heartbeats to %s: what answers at its address is another program; a lost "
                "process is noticed after training.timeout_s only (GLOO_SOCKET_IFNAME names the "
                "network)",
                self.parent_state,
            )
        rank = self._forget(link)
        if rank is not None:
            self._ended(link, rank, "its process has ended", ENDED_GRACE_S)

    def _drop(self, link: Link) -> None:
        """Close a connection on which neither side loses the other."""
        link.send({"kind": "bye", "reason": "", "rank": self.describe().rank})
        rank = self._forget(link)
        if rank is not None:
            self.monitor.left(rank)

    def _forget(self, link: Link) -> int | None:
        """Close and remove a connection; the neighbor's rank, None for a stranger."""
        link.close()
        if link in self.strangers:
            self.strangers.remove(link)
        if link is self.parent:
            self.parent = None
            return None if self.parent_state is None else self.parent_state.rank
        rank = next((rank for rank, child in self.children.items() if child is link), None)
        if rank is not None:
            del self.children[rank]
        return rank

    def _ended(self, link: Link, rank: int, reason: str, grace_s: float) -> None:
        had_loss = self.monitor.loss is not None
        self.monitor.ended(rank, reason, grace_s)
        if self.monitor.loss is not None and not had_loss:
            self._pass_on(self.monitor.loss, received_from=link)

    def _pass_on(self, loss: Loss, received_from: Link | None) -> None:
        for link in self.links():
            if link is not received_from and link not in self.strangers:
                link.send({"kind": "loss", "loss": loss.message()})
