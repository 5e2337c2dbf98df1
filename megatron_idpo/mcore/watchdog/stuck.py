"""Which process is stuck, from the states of all of them.

A process that is stuck soon makes all others wait, and their progress ends at almost the same time.
The stuck one is named if it differs from the others; otherwise the message lists all of them.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from megatron_idpo.mcore.watchdog.monitor import SILENT_GRACE_S, Loss, PeerState, ranges


def stuck_loss(states: Sequence[PeerState], limit_s: float, margin_s: float) -> Loss | None:
    """The loss to report if a timed activity makes no progress.

    Args:
        states: of all known processes; at least one.
        limit_s: without progress, after which a timed activity is stuck.
        margin_s: by which `idle_s` of two processes is not comparable: heartbeats are that old.
    """
    if not any(state.is_timed and state.idle_s >= limit_s for state in states):
        return None
    culprit = _culprit(states, margin_s)
    if culprit is None:
        reason = f"no process makes progress, and which one is stuck is not known: {_table(states)}"
        return Loss(None, reason, grace_s=SILENT_GRACE_S)
    reason = f"no progress for {culprit.idle_s:.0f} s (training.timeout_s)"
    if len(states) > 1:
        reason += f"; all: {_table(states)}"
    return Loss(culprit, reason, grace_s=SILENT_GRACE_S)


def _culprit(states: Sequence[PeerState], margin_s: float) -> PeerState | None:
    """The only one in another activity, or the first whose progress ended."""
    counts = Counter(state.activity for state in states)
    alone = [state for state in states if counts[state.activity] == 1 and state.idle_s > margin_s]
    if len(counts) == 2 and len(states) > 2 and len(alone) == 1:
        return alone[0]
    oldest, *others = sorted(states, key=lambda state: -state.idle_s)
    if others and oldest.idle_s - others[0].idle_s <= margin_s:
        return None
    return oldest


def _table(states: Sequence[PeerState]) -> str:
    """`ranks 0-2: step 8, training step, 1712 s; rank 3: ...`."""
    by_activity: defaultdict[str, list[PeerState]] = defaultdict(list)
    for state in states:
        by_activity[state.activity].append(state)
    return "; ".join(
        f"{'ranks' if same[1:] else 'rank'} {ranges([state.rank for state in same])}: {activity}, "
        f"{max(state.idle_s for state in same):.0f} s"
        for activity, same in by_activity.items()
    )
