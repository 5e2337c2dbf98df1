"""What launchers and workers report to each other while the workers start."""

from torch.distributed import HashStore

from megatron_idpo.errors import EXIT_PEER_LOST, EXIT_PREEMPTED
from megatron_idpo.mcore.watchdog.launch_notes import (
    BEAT_S,
    LaunchEnd,
    NeighborWatch,
    beat,
    report_end,
)

TIMEOUT_S = 40.0
NAME = "ranks 8-15 (host node-b)"


def look_for(watch: NeighborWatch, start_s: float, seconds: float) -> LaunchEnd | None:
    """What the looks within some seconds find."""
    for index in range(int(seconds / BEAT_S)):
        if (end := watch.look(start_s + index * BEAT_S)) is not None:
            return end
    return None


def test_a_machine_whose_workers_start_slowly_is_not_lost():
    """Importing torch for three minutes: its launcher sends beats meanwhile."""
    notes = HashStore()
    watch = NeighborWatch(notes, 1, TIMEOUT_S)
    for index in range(int(180.0 / BEAT_S)):
        if index % 5 == 0:  # late, on a busy machine
            beat(notes, 1, index, NAME)
        assert watch.look(index * BEAT_S) is None


def test_a_machine_without_beats_is_lost_for_all():
    notes = HashStore()
    watch = NeighborWatch(notes, 1, TIMEOUT_S)
    beat(notes, 1, 0, NAME)
    assert look_for(watch, 0.0, TIMEOUT_S) is None
    end = look_for(watch, TIMEOUT_S, 3 * BEAT_S)
    assert end is not None and end.code == EXIT_PEER_LOST
    assert end.reason.startswith(f"the launcher of {NAME} is silent for 4")
    assert NeighborWatch(notes, 2, TIMEOUT_S).look(0.0) == end


def test_silence_does_not_count_while_this_process_is_suspended():
    notes = HashStore()
    watch = NeighborWatch(notes, 1, TIMEOUT_S)
    beat(notes, 1, 0, NAME)
    assert watch.look(0.0) is None
    assert watch.look(3600.0) is None


def test_a_machine_that_never_sends_beats_is_not_lost():
    """It was started by plain torchrun."""
    assert look_for(NeighborWatch(HashStore(), 1, TIMEOUT_S), 0.0, 10 * TIMEOUT_S) is None


def test_the_first_report_of_an_end_counts():
    notes = HashStore()
    first = LaunchEnd("rank 3 (host node-a) was stopped by a signal", EXIT_PREEMPTED)
    assert report_end(notes, first) == first
    assert report_end(notes, LaunchEnd("rank 0 has ended", EXIT_PEER_LOST)) == first
    assert NeighborWatch(notes, 1, TIMEOUT_S).look(0.0) == first
