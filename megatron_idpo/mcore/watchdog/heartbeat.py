"""The heartbeats of one process: to its parent and its children in the tree of processes.

| message | meaning |
|---|---|
| `hello` | the first from a child: the run's token, which a stranger does not have |
| `beat` | states of the sender and of the processes below it |
| `bye` | the sender has finished; with a reason: it ends because of an error |
| `loss` | a process is lost; passed on to all other neighbors |
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from megatron_idpo.mcore.watchdog.link import Link, Message
from megatron_idpo.mcore.watchdog.monitor import Loss, Monitor, PeerState


@dataclass
class Heartbeat:
    """One process in the tree. Not thread-safe; `watch.py` calls it from one thread."""

    describe: Callable[[], PeerState]
    """The state of this process."""

    token: str
    """Of the run."""

    monitor: Monitor
    parent: Link | None = None
    parent_state: PeerState | None = None
    """What is known of the parent before its first heartbeat."""

    strangers: list[Link] = field(default_factory=list)
    """Accepted, without a `hello` yet."""

    children: dict[int, Link] = field(default_factory=dict)
    """By rank."""

    def __post_init__(self) -> None:
        """Introduce this process to its parent."""
        if self.parent is not None and self.parent_state is not None:
            self.monitor.heard([self.parent_state])
            self.parent.send({"kind": "hello", "token": self.token, **self._beat([])})

    def beat(self, now_s: float) -> None:
        """Send heartbeats, and count the silence of neighbors. Call `receive` first."""
        below = self.monitor.below(self.children)
        if self.parent is not None:
            self.parent.send({"kind": "beat", **self._beat(below)})
        for child in self.children.values():
            child.send({"kind": "beat", **self._beat([])})
        had_loss = self.monitor.loss is not None
        self.monitor.tick(now_s)
        if self.monitor.loss is not None and not had_loss:
            self._pass_on(self.monitor.loss, received_from=None)

    def receive(self, links: Sequence[Link] | None = None) -> None:
        """Handle what has arrived on some links, by default on all."""
        for link in self.links() if links is None else links:
            for message in link.receive():
                self._handle(link, message)
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

    def leave(self, reason: str = "") -> None:
        """Close all connections. The others treat it as a loss if there is a reason."""
        for link in self.links():
            link.send({"kind": "bye", "reason": reason, "rank": self.describe().rank})
            link.close()
        self.parent, self.children, self.strangers = None, {}, []

    def _beat(self, below: Sequence[PeerState]) -> Message:
        return {"states": [asdict(state) for state in (self.describe(), *below)]}

    def _handle(self, link: Link, message: Message) -> None:
        kind = message.get("kind")
        if link in self.strangers:
            if kind != "hello" or message.get("token") != self.token:
                link.is_closed = True
                return
            self.strangers.remove(link)
            self.children[message["states"][0]["rank"]] = link
        if kind in ("hello", "beat"):
            self.monitor.heard([PeerState.of(state) for state in message["states"]])
        elif kind == "bye" and message["reason"]:
            self._ended(link, message["rank"], f"it ended with {message['reason']}")
        elif kind == "bye":
            self.monitor.left(message["rank"])
        elif kind == "loss":
            loss = Loss.of(message["loss"])
            if self.monitor.reported(loss):
                self._pass_on(loss, received_from=link)

    def _closed(self, link: Link) -> None:
        """The neighbor has gone; without a `bye`, its process has died."""
        link.close()
        if link in self.strangers:
            self.strangers.remove(link)
            return
        rank = next((rank for rank, child in self.children.items() if child is link), None)
        if rank is not None:
            del self.children[rank]
        elif self.parent_state is not None:
            self.parent, rank = None, self.parent_state.rank
        if rank is not None:
            self._ended(link, rank, "its process has ended")

    def _ended(self, link: Link, rank: int, reason: str) -> None:
        had_loss = self.monitor.loss is not None
        self.monitor.ended(rank, reason)
        if self.monitor.loss is not None and not had_loss:
            self._pass_on(self.monitor.loss, received_from=link)

    def _pass_on(self, loss: Loss, received_from: Link | None) -> None:
        for link in self.links():
            if link is not received_from and link not in self.strangers:
                link.send({"kind": "loss", "loss": loss.message()})
