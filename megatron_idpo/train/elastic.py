"""Elastic runs whose number of machines does not fit the configuration."""

import logging
import os

from megatron_idpo.config.objective import SORTED
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import EXIT_PREEMPTED, Problem
from megatron_idpo.mcore.parallel.world import World, all_gather_objects
from megatron_idpo.mcore.watchdog.launch_notes import Launch, set_usable

logger = logging.getLogger(__name__)

_STORE_TIMEOUT_S = 60.0


def waits_for_other_machines(config: RunConfig, world: World) -> bool:
    """Whether the number of processes does not fit, but may fit in another start. Collective.

    Reports it, and how many machines fit. Where no number fits, the configuration is wrong, which
    `prepare` raises. Before that, the first rank records the numbers that fit for the launchers,
    which leave a machine waiting with which the number would not.

    Args:
        config: of the run.
        world: all processes.
    """
    launch = Launch.from_environment()
    numbers = [] if launch is None else usable_numbers(config, launch)
    if world.is_first and launch is not None and launch.fewest < launch.most:
        set_usable(launch.connect(_STORE_TIMEOUT_S), numbers)
    # Counted by each machine for itself: one that joined later has not restarted.
    restarts = max(all_gather_objects(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    problems = size_problems(config, world.size)
    if not problems or not (numbers or restarts):
        return False
    if world.is_first:
        others = ", ".join(map(str, numbers))
        start = f"with a usable number of machines ({others})" if others else "with more processes"
        logger.warning(
            "%d processes cannot share this run: %s. Ended, to be started again %s "
            "(exit code %d); everything saved so far is complete",
            *(world.size, "; ".join(map(str, problems)), start, EXIT_PREEMPTED),
        )
    return True


def usable_numbers(config: RunConfig, launch: Launch) -> list[int]:
    """The numbers of machines, each as large as this one, with which the run can work."""
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    numbers = range(launch.fewest, launch.most + 1)
    return [number for number in numbers if not size_problems(config, number * processes)]


def size_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Why so many processes cannot share the run, as far as the model does not matter."""
    steps = () if config.sdpo is None else config.sdpo.steps
    layouts = dict.fromkeys([config.layout, *(step.layout for step in steps if step.layout)])
    problems = [one for layout in layouts for one in layout.problems_for(None, world_size)]
    if not problems and config.objective.uses(*SORTED):
        sizes = {layout.data(world_size) for layout in layouts}
        if sizes != {1}:
            message = f"compares all pairs of a batch, over {max(sizes)} data-parallel ranks"
            problems.append(Problem("objective.loss", message))
    return problems
