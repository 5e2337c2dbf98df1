"""What heartbeats cost the busiest process: CPU time of rank 0 per interval, and memory.

    python benchmarks/heartbeat.py [--ranks 8 512] [--per-machine 8] [--save]

Rank 0 has real connections (socket pairs) to its children, which are in the same process and
describe as many ranks as they would in such a run. Only rank 0's work is timed: receiving,
decoding, counting silence, encoding and sending.
"""

import argparse
import os
import socket
import time
from dataclasses import asdict
from datetime import date

from result_file import commit, processor, save_result

from megatron_idpo.config.training import DEFAULT_HEARTBEAT_TIMEOUT_S
from megatron_idpo.mcore.watchdog.heartbeat import Heartbeat
from megatron_idpo.mcore.watchdog.link import SocketLink
from megatron_idpo.mcore.watchdog.monitor import Monitor, PeerState

INTERVAL_S = DEFAULT_HEARTBEAT_TIMEOUT_S / 8
ROUNDS = 200
POLLS = 10


def state(rank: int) -> PeerState:
    """A typical state."""
    return PeerState(rank, f"node-{rank // 8:03d}.cluster", "step 1234, training step", (1, 4))


def measure(num_ranks: int, per_machine: int) -> tuple[int, float, float]:
    """Number of connections of rank 0, its CPU time per interval in ms, its messages in kB."""
    below = {rank: [state(rank)] for rank in range(1, per_machine)}
    for first in range(per_machine, num_ranks, per_machine):
        below[first] = [state(rank) for rank in range(first, first + per_machine)]
    root = Heartbeat(lambda: state(0), Monitor(8 * INTERVAL_S, INTERVAL_S))
    children: list[SocketLink] = []
    for rank in below:
        ours, theirs = socket.socketpair()
        children.append(SocketLink(theirs))
        root.strangers.append(SocketLink(ours))
        children[-1].send({"kind": "hello", "states": [asdict(state(rank))]})
    root.receive()
    beats = [
        {"kind": "beat", "states": [asdict(one) for one in states]} for states in below.values()
    ]
    spent_s = 0.0
    for index in range(ROUNDS):
        for child, beat in zip(children, beats, strict=True):
            child.receive()
            child.send(beat)
        start_s = time.thread_time()
        for _ in range(POLLS):
            root.receive()
        root.beat(index * INTERVAL_S)
        spent_s += time.thread_time() - start_s
    assert root.monitor.loss is None
    sent_kB = sum(len(str(beat)) for beat in beats) / 1e3
    return len(children), spent_s / ROUNDS * 1e3, sent_kB


def main() -> None:
    """Print a table; with `--save` also into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--per-machine", type=int, default=8)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    text = "\n".join(
        [
            "# What heartbeats cost rank 0",
            "",
            f"{date.today()}, {processor()}, load average {os.getloadavg()[0]:.1f}; commit "
            f"{commit()}; {options.per_machine} processes per machine, a heartbeat every "
            f"{INTERVAL_S:g} s. What is measured stands in `benchmarks/heartbeat.py`.",
            "",
            f"| ranks | connections of rank 0 | ms of CPU per {INTERVAL_S:g} s | share of the time "
            "| kB received |",
            "|---|---|---|---|---|",
        ]
    )
    for num_ranks in options.ranks:
        connections, spent_ms, kB = measure(num_ranks, options.per_machine)
        share = spent_ms / 1e3 / INTERVAL_S
        text += f"\n| {num_ranks} | {connections} | {spent_ms:.2f} | {share:.3%} | {kB:.1f} |"
    print(text)
    if options.save:
        save_result("heartbeat", text)


if __name__ == "__main__":
    main()
